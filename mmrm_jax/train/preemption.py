"""SIGTERM and Ctrl-C: training saves at the end of a step and stops, to go on when the command is given again."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmrm_jax.sharding import replicated
from mmrm_jax.signals import INTERRUPTED, PREEMPTED, heard, leave


class Preempted(Exception):
    """Training was asked to stop and has saved where it is; `status` is what the process is to exit with."""

    def __init__(self, step: int, received: signal.Signals):
        super().__init__(f"stopped by {received.name} and saved at step {step}; give the same command again to go on")
        self.status = INTERRUPTED if received == signal.SIGINT else PREEMPTED


class Preemption:
    """Which signal asks training to stop, if any. Of several processes all get the same answer, one step late.

    JAX has a service for this (`multihost_utils.reached_preemption_sync_point`), which forgets a notice that comes
    before the first step, and one that comes when Orbax has asked it about an earlier step.
    """

    def __init__(self, mesh: Mesh):
        self._received = 0
        self._each = NamedSharding(mesh, P(mesh.axis_names))  # a number for every device
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._asked: jax.Array | None = None

    def __call__(self) -> signal.Signals | None:
        """To be called after every step, by every process."""
        agreed = self._received
        if jax.process_count() > 1:
            own = np.full(jax.local_device_count(), self._received, np.int32)
            before, self._asked = self._asked, self._largest(jax.make_array_from_process_local_data(self._each, own))
            agreed = 0 if before is None else int(before)
        return signal.Signals(agreed) if agreed else None

    def receive(self, number: signal.Signals) -> None:
        """Note a signal; a second one ends the process at once."""
        if self._received:
            print(f"{number.name}: stopped at once; give the same command again to go on", file=sys.stderr)
            leave(128 + number)
        self._received = number
        print(f"{number.name}: saving after this step; a second signal stops at once", file=sys.stderr, flush=True)


@contextmanager
def handled(mesh: Mesh) -> Iterator[Preemption]:
    """Signals reach the Preemption inside, and what handled them before afterwards; in the main thread only."""
    preemption = Preemption(mesh)
    with heard((signal.SIGINT, signal.SIGTERM), preemption.receive):
        yield preemption
