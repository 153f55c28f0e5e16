"""Several processes: how one finds the others, and who writes what.

Nothing in the environment means one process. Several are named by hand,

    MMRM_COORDINATOR=host:port  MMRM_NUM_PROCESSES=n  MMRM_PROCESS_ID=0..n-1

or found by JAX on a cluster it knows (SLURM, TPU pods, GKE, Open MPI): MMRM_DISTRIBUTED=auto.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmrm_jax.signals import leave

BY_HAND = ("MMRM_COORDINATOR", "MMRM_NUM_PROCESSES", "MMRM_PROCESS_ID")
DETECT = "MMRM_DISTRIBUTED"


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes that the environment names; returns at once where it names none.

    To be called before the first use of a device. Raises ValueError for variables that are missing or wrong.
    """
    detect, given = environment.get(DETECT, ""), _given(environment)
    if detect not in ("", "auto"):
        raise ValueError(f"{DETECT} is {detect!r}; it must be auto, or not be set")
    if detect and given is not None:
        raise ValueError(f"{DETECT}=auto and {', '.join(BY_HAND)} are set; choose one of them")
    jax.config.update("jax_enable_preemption_service", False)  # `train.preemption` listens itself
    if given is not None:
        jax.distributed.initialize(*given)
    elif detect:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(f"{DETECT}=auto: JAX found no cluster ({error}); set {', '.join(BY_HAND)}") from error


def _given(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator, number of processes, number of this one), where they are named by hand."""
    given = {name: environment[name] for name in BY_HAND if environment.get(name)}
    if not given:
        return None
    if missing := [name for name in BY_HAND if name not in given]:
        raise ValueError(
            f"{', '.join(given)} set without {', '.join(missing)}: set all of {', '.join(BY_HAND)}, or none"
        )
    address, count, index = (given[name] for name in BY_HAND)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise ValueError(f"MMRM_PROCESS_ID={index} of MMRM_NUM_PROCESSES={count}: they must be 0..n-1 and n")
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"MMRM_COORDINATOR is {address!r}; it must be host:port of the process with number 0")
    return address, int(count), int(index)


def is_main() -> bool:
    """Whether this process writes what there is one of: metrics, reports, configuration, quarantine."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(name)


def any_process(value: bool) -> bool:
    """Whether `value` holds in any process; all of them must ask."""
    if not jax.distributed.is_initialized():
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def divided(
    work: Callable[[int], Any], count: int, progress: Callable[[range], Iterable[int]] = lambda indices: indices
) -> list[Any]:
    """[work(0), ..., work(count - 1)], which are JSON values: each process does its part, and all get the whole."""
    if not jax.distributed.is_initialized():
        return [work(index) for index in progress(range(count))]
    part, parts = jax.process_index(), jax.process_count()
    mine = range(count * part // parts, count * (part + 1) // parts)
    text = json.dumps([work(index) for index in progress(mine)]).encode()
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(text)))))
    texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8)).reshape(parts, longest)
    return [value for each in texts for value in json.loads(each.tobytes())]


def require_agreement(value: Any, what: str) -> None:
    """Raises ValueError in every process where they do not all have the same JSON value; all of them must ask."""
    found = divided(lambda _: value, jax.process_count())
    if different := [i for i, each in enumerate(found) if each != found[0]]:
        raise ValueError(
            f"processes see different {what}: process {different[0]} others than process 0; is the data on a file "
            "system that all of them share?"
        )


def shutdown() -> None:
    """Leave together, so that none is taken for dead."""
    if jax.distributed.is_initialized():
        barrier("shutdown")
        jax.distributed.shutdown()


def abandon(status: int) -> None:
    """End this process at once where there are others: leaving in an orderly way would wait for them to do the same."""
    if jax.distributed.is_initialized():
        leave(status)


def own_file(path: Path) -> Path:
    """`path` in the main process; in the others a file of their own beside it, which `other_files` finds."""
    return path if is_main() else path.with_name(f"{path.stem}.process-{jax.process_index()}{path.suffix}")


def other_files(path: Path) -> list[Path]:
    """The files that the processes beside the main one have written in place of `path`."""
    return sorted(path.parent.glob(f"{path.stem}.process-*{path.suffix}"))
