"""What a run leaves in its directory while it trains: metrics, TensorBoard events, checkpoints."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import jax

from mmrm_jax.config import TrainConfig
from mmrm_jax.distributed import is_main
from mmrm_jax.files import write_atomic
from mmrm_jax.train.checkpoint import Checkpoints
from mmrm_jax.train.interval import TrainingError
from mmrm_jax.train.preemption import Preempted
from mmrm_jax.train.state import TrainState


class RunFiles:
    """`metrics.jsonl`, TensorBoard and checkpoints of a run directory; nothing without one.

    `history` are the entries up to `step` that are there already, `pending` the metrics of steps after the last entry,
    which went with the checkpoint, up to `step`. Later entries and checkpoints are replaced. Of several processes the
    main one writes; checkpoints are everybody's.
    """

    def __init__(self, run_dir: Path | None, step: int, config: TrainConfig):
        self.run_dir, self.step, self.config = run_dir, step, config
        self.history = [] if run_dir is None else _entries_up_to(run_dir / "metrics.jsonl", step)
        self.pending: list[dict[str, Any]] = []

    def __enter__(self) -> RunFiles:
        if self.run_dir is None:
            return self
        self._checkpoints = Checkpoints(self.run_dir / "checkpoints", self.config)
        self._checkpoints.discard_after(self.step)
        if not self.history or self.history[-1]["step"] != self.step:
            self.pending = self._checkpoints.pending(self.step)
        if is_main():
            from tensorboardX import SummaryWriter

            path = self.run_dir / "metrics.jsonl"
            write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in self.history))
            self._metrics = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.step + 1)
        return self

    def write(self, entry: dict[str, Any]) -> None:
        """Append an entry to the history."""
        self.history.append(entry)
        if self.run_dir is None or not is_main():
            return
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        for name, value in entry.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(name, value, entry["step"])

    def checkpoint(self, step: int, state: TrainState, pending: list[dict[str, Any]]) -> None:
        """Start saving; the entries before the `pending` steps are on the disk before."""
        if self.run_dir is None:
            return
        if is_main():
            os.fsync(self._metrics.fileno())
        self._checkpoints.save(step, state, pending=pending)

    def rank(self, step: int, measured: dict[str, float | None]) -> None:
        """Rank the checkpoint of `step` by what was measured there."""
        if self.run_dir is not None:
            self._checkpoints.rank(step, measured)

    def write_batch(self, step: int, reason: str, groups: list[dict[str, Any]]) -> Path | None:
        """Write which groups a step saw to `batch-STEP.json`, and give its path."""
        if self.run_dir is None:
            return None
        path = self.run_dir / f"batch-{step}.json"
        if is_main():
            write_atomic(path, json.dumps({"step": step, "reason": reason, "groups": groups}, indent=1) + "\n")
        return path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.run_dir is None:
            return
        # Closing waits for the other processes, which may know nothing of an error that this one has alone.
        shared = error is None or isinstance(error, Preempted | TrainingError) or jax.process_count() == 1
        try:
            if shared:
                self._checkpoints.close()
        except Exception:
            if error is None:  # else what went wrong first is what is to be told
                raise
        finally:
            if is_main():
                self._metrics.close()
                self._board.close()


def _entries_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The entries of an interrupted run's `metrics.jsonl` that a resumed run keeps; its last line may be cut short."""
    if not step or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry["step"] <= step]
