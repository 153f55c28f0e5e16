"""The training loop: batches in, a trained state and its history out."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmrm_jax.config import TrainConfig
from mmrm_jax.train.checkpoint import Checkpoints
from mmrm_jax.train.program import Program
from mmrm_jax.train.state import TrainState
from mmrm_jax.types import Batch

Report = Callable[[int, dict[str, float]], None]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to look at."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """`history` has one entry per logging interval: means over it, and "sfc/histogram" counts where there are any."""

    state: TrainState
    history: list[dict[str, Any]]
    seconds: float


def train(
    program: Program,
    state: TrainState,
    stream: Iterable[Batch],
    config: TrainConfig,
    *,
    steps: int,
    run_dir: Path | None = None,
    report: Report = lambda step, metrics: None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
) -> TrainResult:
    """Run from `state.step` to `steps`; `stream` yields the batches from there on.

    With a `run_dir` it writes `metrics.jsonl`, TensorBoard events and checkpoints. `report` is called at every
    logging interval. Raises TrainingError where the loss or a gradient stops being finite.
    """
    start = time.monotonic()
    history: list[dict[str, Any]] = []
    pending: list[dict[str, jax.Array]] = []
    batches = iter(stream)
    with _Writers(run_dir, int(state.step)) as writers:
        for step in range(int(state.step), steps):
            state, metrics = program.train_step(state, program.put(_next(batches, step)))
            pending.append(metrics)
            last = step + 1 == steps
            if (step + 1) % config.log_every == 0 or last:
                entry = _interval(pending, step + 1, time.monotonic() - start, config.batch_size)
                pending = []
                if evaluate is not None and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                    entry |= evaluate(state)
                history.append(entry)
                writers.write(entry)
                report(step + 1, entry)
            if last or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
                writers.checkpoint(step + 1, state)
    return TrainResult(state, history, time.monotonic() - start)


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise TrainingError(f"the data ended before step {step + 1}") from None


def _interval(pending: list[dict[str, jax.Array]], step: int, seconds: float, batch_size: int) -> dict[str, Any]:
    """Means over the steps of one interval; histograms are added up."""
    fetched = jax.device_get(pending)
    entry: dict[str, Any] = {"step": step, "seconds": seconds, "groups": step * batch_size}
    for name in fetched[0]:
        values = np.stack([m[name] for m in fetched])
        if name.endswith("histogram"):
            entry[name] = values.sum(axis=0).tolist()
            continue
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            at = step - len(fetched) + int(bad[0]) + 1
            raise TrainingError(f"{name} is {values[bad[0]]} at step {at}: lower the learning rate or check the data")
        entry[name] = float(values.mean())
    return entry


class _Writers:
    """`metrics.jsonl`, TensorBoard and checkpoints of a run directory; nothing without one."""

    def __init__(self, run_dir: Path | None, step: int):
        self.run_dir, self.step = run_dir, step

    def __enter__(self) -> _Writers:
        if self.run_dir is not None:
            from tensorboardX import SummaryWriter

            kept = _entries_up_to(self.run_dir / "metrics.jsonl", self.step)
            self._metrics = (self.run_dir / "metrics.jsonl").open("w")
            self._metrics.writelines(kept)
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.step or None)
            self._checkpoints = Checkpoints(self.run_dir / "checkpoints")
        return self

    def write(self, entry: dict[str, Any]) -> None:
        if self.run_dir is None:
            return
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        for name, value in entry.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(name, value, entry["step"])

    def checkpoint(self, step: int, state: TrainState) -> None:
        if self.run_dir is not None:
            self._checkpoints.save(step, state)

    def __exit__(self, *error: object) -> None:
        if self.run_dir is not None:
            self._metrics.close()
            self._board.close()
            self._checkpoints.close()


def _entries_up_to(path: Path, step: int) -> list[str]:
    """The lines of an interrupted run's `metrics.jsonl` that a resumed run keeps."""
    if not step or not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
