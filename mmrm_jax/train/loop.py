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
    """`history` has one entry per logging interval: means over it, and "sfc/histogram" counts where there are any.

    It and `seconds` include what came before, in a run that was resumed.
    """

    state: TrainState
    history: list[dict[str, Any]]
    seconds: float


def resume(program: Program, initial: TrainState, run_dir: Path) -> TrainState:
    """The newest checkpoint in `run_dir`, or `initial` where there is none."""
    if not (run_dir / "checkpoints").exists():
        return initial
    checkpoints = Checkpoints(run_dir / "checkpoints")
    step = checkpoints.latest()
    state = initial if step is None else checkpoints.restore(step, initial)
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
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
) -> TrainResult:
    """Run from `state.step` to `steps`; `stream` yields the batches from there on.

    With a `run_dir` it writes `metrics.jsonl`, TensorBoard events and checkpoints; what lies there from steps after
    `state.step` is replaced. A logging interval ends every `log_every` steps and wherever there is an evaluation or a
    checkpoint, so that a resumed run logs what an uninterrupted one does; `report` is called at each. Raises
    TrainingError where the loss or a gradient stops being finite.
    """
    pending: list[dict[str, jax.Array]] = []
    batches = iter(stream)
    with _Writers(run_dir, int(state.step)) as writers:
        history = writers.history
        start = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
        for step in range(int(state.step) + 1, steps + 1):
            state, metrics = program.train_step(state, program.put(_next(batches, step)))
            pending.append(metrics)
            evaluating = evaluate is not None and _due(config.eval_every, step, steps)
            saving = _due(config.checkpoint_every, step, steps)
            if evaluating or saving or _due(config.log_every, step, steps):
                entry = _interval(pending, step, time.monotonic() - start, config.batch_size)
                pending = []
                if evaluate is not None and evaluating:
                    entry |= evaluate(state)
                history.append(entry)
                writers.write(entry)
                report(step, entry)
            if saving:
                writers.checkpoint(step, state)
    return TrainResult(state, history, time.monotonic() - start)


def _due(every: int | None, step: int, steps: int) -> bool:
    return step == steps or (every is not None and step % every == 0)


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise TrainingError(f"the data ended before step {step}") from None


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
        self.history = [] if run_dir is None else _entries_up_to(run_dir / "metrics.jsonl", step)

    def __enter__(self) -> _Writers:
        if self.run_dir is not None:
            from tensorboardX import SummaryWriter

            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._checkpoints = Checkpoints(self.run_dir / "checkpoints")
            self._checkpoints.discard_after(self.step)
            self._metrics = (self.run_dir / "metrics.jsonl").open("w")
            self._metrics.writelines(json.dumps(entry) + "\n" for entry in self.history)
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.step + 1)
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


def _entries_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The entries of an interrupted run's `metrics.jsonl` that a resumed run keeps; its last line may be cut short."""
    if not step or not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry["step"] <= step]
