"""Signals, as the training loop hears of them."""

from __future__ import annotations

import os
import signal

import pytest

from mmrm_jax.config import MeshConfig
from mmrm_jax.sharding import make_mesh
from mmrm_jax.train.preemption import INTERRUPTED, PREEMPTED, Preempted, handled


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_is_noted_and_its_handlers_come_back(capsys, number, status) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with handled(make_mesh(MeshConfig())) as stop:
        assert stop() is None
        os.kill(os.getpid(), number)
        assert stop() == number and stop() == number
        assert f"{number.name}: saving after this step" in capsys.readouterr().err
        # A second one does what it does without a handler.
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    stopped = Preempted(7, number)
    assert stopped.status == status and "saved at step 7; give the same command again" in str(stopped)
    assert len({PREEMPTED, INTERRUPTED, 0, 1, 2}) == 5
