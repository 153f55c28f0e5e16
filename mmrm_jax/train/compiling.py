"""Hearing of compilations, and handing back memory that was freed before a step's own peak."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that jax.monitoring has for each compilation
LONG = 1.0  # seconds; what compiles faster leaves little behind


@contextmanager
def compilations_heard(call: Callable[[float], object]) -> Iterator[None]:
    """Call `call` with the seconds of every compilation inside the block, as it ends."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            call(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compiler_memory_released() -> AbstractContextManager[None]:
    """`release_freed_memory` after every long compilation."""
    return compilations_heard(lambda seconds: release_freed_memory() if seconds > LONG else None)


def release_freed_memory() -> None:
    """Give the system back what the C library keeps of freed memory.

    glibc keeps what a process frees for what it asks for next; XLA's compiler frees hundreds of megabytes in small
    pieces, loading a model some more, and a step's buffers, which are large, take none of it. Does nothing where the C
    library is not glibc.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
