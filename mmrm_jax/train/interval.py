"""The steps since the last entry of metrics.jsonl: fetched, checked, averaged."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

COUNTS = ("comparisons", "decided")  # what a step's means are taken over


class NonFinite(Exception):
    """A metric of `step` is not finite; `groups` is the batch's `group_index` on the mesh."""

    def __init__(self, step: int, name: str, value: float, groups: jax.Array):
        super().__init__(f"{name} is {value} at step {step}")
        self.step, self.groups = step, groups


class TrainingError(RuntimeError):
    """Training cannot go on, in any process; the message says at which step and what to look at."""


class Interval:
    """Metrics of finished steps, and of one that is in flight: the host stays one step ahead of the devices, no more.

    So a signal is answered within two steps, and a loss that is not finite is met at once.
    """

    def __init__(self, pending: list[dict[str, Any]]):
        """`pending` are the finished steps of an interval that was broken off: what `finished` gave."""
        self._finished = [{name: np.asarray(value, np.float32) for name, value in step.items()} for step in pending]
        self._flying: tuple[int, dict[str, jax.Array], jax.Array] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array], groups: jax.Array) -> None:
        """A step that has been started. Waits for the one before; raises NonFinite as `settle` does."""
        self.settle()
        self._flying = step, metrics, groups

    def settle(self) -> None:
        """Wait for the step in flight. Raises NonFinite where one of its metrics is not finite."""
        if self._flying is None:
            return
        (step, metrics, groups), self._flying = self._flying, None
        values = jax.device_get(metrics)
        for name in sorted(values):
            bad = values[name][~np.isfinite(values[name])]
            if bad.size:
                raise NonFinite(step, name, float(bad.flat[0]), groups)
        self._finished.append(values)

    def finished(self) -> list[dict[str, Any]]:
        """Metrics of every finished step as JSON values, exactly."""
        return [{name: value.tolist() for name, value in step.items()} for step in self._finished]

    def close(self) -> dict[str, Any]:
        """Means over the comparisons of the finished steps, and an empty interval; counts are added up.

        Accuracy is None where all comparisons are ties.
        """
        columns = {name: np.stack([step[name] for step in self._finished]) for name in self._finished[0]}
        comparisons, decided = (columns[name].astype(np.float64) for name in COUNTS)
        entry: dict[str, Any] = {}
        for name, values in columns.items():
            if name in COUNTS:
                entry[name] = int(values.sum())
            elif name.endswith("histogram"):
                entry[name] = values.sum(axis=0).tolist()
            elif name == "grad_norm":
                entry[name] = float(values.mean())
            else:
                entry[name] = _mean(values, decided if name.endswith("/accuracy") else comparisons)
        self._finished = []
        return entry


def _mean(values: np.ndarray, counts: np.ndarray) -> float | None:
    return float(np.average(values, weights=counts)) if counts.any() else None
