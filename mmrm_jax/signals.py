"""Signals heard at once, whatever the main thread is doing, and an end of the process that waits for nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

PREEMPTED = 75  # exit status after SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"
INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C


@contextmanager
def heard(numbers: tuple[signal.Signals, ...], receive: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `receive` in a thread of its own for each of these signals; afterwards, what handled them before does again.

    Python runs its handlers in the main thread, which may be compiling for minutes. Does nothing outside that thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def listen() -> None:
        while byte := ours.recv(1):
            if byte[0] in numbers:
                receive(signal.Signals(byte[0]))

    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    woken = signal.set_wakeup_fd(pythons.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        pythons.close()  # which ends the listener
        listener.join()
        ours.close()


def leave(status: int) -> NoReturn:
    """End this process and those it started at once: an orderly exit can crash while XLA still compiles."""
    for child in multiprocessing.active_children():
        child.terminate()
    if sys.stdout.isatty():
        print("\x1b[?25h", end="")  # a progress bar hides the cursor
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
