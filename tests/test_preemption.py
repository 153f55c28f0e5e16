"""Signals, as the training loop hears of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mmrm_jax.config import MeshConfig
from mmrm_jax.sharding import make_mesh
from mmrm_jax.train.preemption import INTERRUPTED, PREEMPTED, Preempted, handled


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_is_noted_and_its_handlers_come_back(capsys, number, status) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with handled(make_mesh(MeshConfig())) as stop:
        assert stop() is None
        os.kill(os.getpid(), number)
        wait_for(stop)
        assert stop() == number and stop() == number
        wait_for(lambda: f"{number.name}: saving after this step" in capsys.readouterr().err)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    stopped = Preempted(7, number)
    assert stopped.status == status and "saved at step 7; give the same command again" in str(stopped)
    assert len({PREEMPTED, INTERRUPTED, 0, 1, 2}) == 5


BUSY = """
import hashlib
from mmrm_jax.config import MeshConfig
from mmrm_jax.sharding import make_mesh
from mmrm_jax.train.preemption import handled
with handled(make_mesh(MeshConfig())):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without Python's lock, as in a compiler
"""


def test_a_second_signal_ends_what_python_cannot_interrupt() -> None:
    command = [sys.executable, "-c", BUSY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert "SIGINT: saving after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "SIGINT: stopped at once" in errors
