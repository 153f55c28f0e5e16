"""SIGTERM and Ctrl-C: training saves at the end of a step and stops, to go on when the command is given again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # exit status after SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"
INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C


class Preempted(Exception):
    """Training was asked to stop and has saved where it is; `status` is what the process is to exit with."""

    def __init__(self, step: int, received: signal.Signals):
        super().__init__(f"stopped by {received.name} and saved at step {step}; give the same command again to go on")
        self.status = INTERRUPTED if received == signal.SIGINT else PREEMPTED


class Preemption:
    """Which signal asks training to stop, if any: to be called after every step, by every process."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None

    def __call__(self, step: int) -> signal.Signals | None:
        """The signal, once all processes are at the step to save. `step` counts up by one from call to call."""
        if jax.process_count() == 1:
            return self._received
        # JAX's own handler of SIGTERM tells the other processes, and finds the next step that all of them reach.
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal: note it, and have a second one stop at once."""
        self._received = signal.Signals(number)
        print(f"{self._received.name}: stopping after this step; once more to stop at once", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        else:  # Ctrl-C: tell the others as well
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def handled() -> Iterator[Preemption]:
    """Signals reach the Preemption inside, and what handled them before afterwards; in the main thread only."""
    preemption = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    # With several processes SIGTERM is JAX's: it has a handler since they were joined.
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, preemption.receive) for number in numbers}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
