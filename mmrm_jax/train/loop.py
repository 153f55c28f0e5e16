"""The training loop: batches in, a trained state and its history out."""

from __future__ import annotations

import dataclasses
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmrm_jax.config import TrainConfig
from mmrm_jax.sharding import gather
from mmrm_jax.train.checkpoint import Checkpoints, Warn
from mmrm_jax.train.compiling import release_freed_memory
from mmrm_jax.train.interval import Interval, NonFinite, TrainingError
from mmrm_jax.train.preemption import Preempted
from mmrm_jax.train.program import Program
from mmrm_jax.train.run_files import RunFiles
from mmrm_jax.train.state import TrainState
from mmrm_jax.types import Batch

Report = Callable[[int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """`history` has one entry per logging interval: means over it, and "sfc/histogram" counts where there are any.

    It and `seconds` include what came before, in a run that was resumed.
    """

    state: TrainState
    history: list[dict[str, Any]]
    seconds: float


def resume(program: Program, run_dir: Path, warn: Warn = warnings.warn) -> TrainState | None:
    """The newest checkpoint in `run_dir` that is whole, on the program's mesh; None where there is no checkpoint.

    Raises CheckpointError as `Checkpoints.latest` and `restore` do.
    """
    if not (run_dir / "checkpoints").exists():
        return None
    checkpoints = Checkpoints(run_dir / "checkpoints")
    step = checkpoints.latest(warn)
    state = None if step is None else checkpoints.restore(step, program.abstract)
    checkpoints.close()
    return state


def train(
    program: Program,
    state: TrainState,
    stream: Iterable[Batch],
    config: TrainConfig,
    *,
    steps: int,
    run_dir: Path | None = None,
    report: Report = lambda step, metrics: None,
    evaluate: Callable[[TrainState], dict[str, float | None]] | None = None,
    stop: Callable[[], signal.Signals | None] = lambda: None,
    describe: Callable[[int], dict[str, Any]] = lambda index: {"index": index},
    spent: float = 0.0,
) -> TrainResult:
    """Run from `state.step` to `steps`; `stream` yields the batches from there on.

    With a `run_dir` it writes `metrics.jsonl`, TensorBoard events and checkpoints; what lies there from steps after
    `state.step` is replaced. A logging interval ends every `log_every` steps and wherever there is an evaluation or a
    checkpoint, so that a resumed run logs what an uninterrupted one does; `report` is called at each. A checkpoint
    comes before the evaluation at its step: where that fails or is killed, a resumed run begins with it.

    Times begin with the seconds that are `spent` already, where the run does not go on from others.

    `stop` is asked after every step; at a signal the run saves and raises Preempted. Raises TrainingError where the
    loss, a gradient, or a value to be saved is not finite; what `describe` says of the batch's groups is then in the
    file that the message names.
    """
    release_freed_memory()  # of loading the model, say
    with RunFiles(run_dir, int(state.step), config) as files, _iterate(stream) as batches:
        first, interval = int(state.step), Interval(files.pending)
        start = time.monotonic() - (files.history[-1]["seconds"] if files.history else spent)

        def evaluating(step: int) -> bool:
            return evaluate is not None and _due(config.eval_every, step, steps)

        def saving(step: int) -> bool:
            return _due(config.checkpoint_every, step, steps)

        def logging(step: int) -> bool:
            return evaluating(step) or saving(step) or _due(config.log_every, step, steps)

        def log(step: int) -> None:
            seconds = time.monotonic() - start
            entry = {"step": step, "seconds": seconds, "groups": step * config.batch_size} | interval.close()
            if evaluate is not None and evaluating(step):
                entry |= evaluate(state)
            files.write(entry)
            report(step, entry)

        def rank(step: int) -> None:
            if saving(step) and evaluating(step):
                measured = _measured(files.history[-1])
                files.rank(step, measured)
                _check_best(config, measured)

        try:
            if files.pending and logging(first):  # stopped after it had saved, before the entry was there
                log(first)
            if files.history and files.history[-1]["step"] == first and config.best_metric in files.history[-1]:
                rank(first)  # it may have been killed before that
            for step in range(first + 1, steps + 1):
                batch = program.put(_next(batches, step))
                state, metrics = program.train_step(state, batch)
                interval.add(step, metrics, batch.group_index)
                received = None if step == steps else stop()
                if logging(step) or received:
                    interval.settle()
                if saving(step) or received:
                    if not program.is_finite(state):
                        raise NonFinite(step, "a parameter or optimiser moment", np.nan, batch.group_index)
                    files.checkpoint(step, state, interval.finished())
                if logging(step):
                    log(step)
                    rank(step)
                if received:
                    raise Preempted(step, received)
        except NonFinite as error:
            indices = gather(error.groups, program.mesh)
            file = files.write_batch(error.step, str(error), [describe(int(i)) for i in indices.flat if i >= 0])
            where = "" if file is None else f"; the groups of its batch are in {file}"
            raise TrainingError(f"{error}: lower the learning rate or check the data{where}") from error
    return TrainResult(state, files.history, time.monotonic() - start)


def _due(every: int | None, step: int, steps: int) -> bool:
    return step == steps or (every is not None and step % every == 0)


@contextmanager
def _iterate(stream: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    batches = iter(stream)
    try:
        yield batches
    finally:
        if hasattr(batches, "close"):  # of Grain's, which ends its worker processes
            batches.close()  # type: ignore[attr-defined]


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise TrainingError(f"the data ended before step {step}") from None


def _measured(entry: dict[str, Any]) -> dict[str, float | None]:
    """What checkpoints may be ranked by; None is what these data leave undefined."""
    return {k: v for k, v in entry.items() if k != "seconds" and (v is None or isinstance(v, float))}


def _check_best(config: TrainConfig, measured: Iterable[str]) -> None:
    """Raises TrainingError where `best_metric` is to rank checkpoints and is not among what is measured."""
    if config.keep_best and config.best_metric not in measured:
        known = ", ".join(sorted(measured))
        raise TrainingError(f"best_metric {config.best_metric!r} is not among what this run measures: {known}")
