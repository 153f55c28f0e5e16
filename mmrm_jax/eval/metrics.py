"""Accuracy and Shortcut-Failure Degradation of a reward model from its margins, with bootstrap intervals.

Margins are d = r(chosen) - r(rejected). All arithmetic is numpy float64. Intervals are 95 % percentile intervals
of a cluster bootstrap: comparisons of one image are not independent, so whole images are resampled. Sums over
resamples are matrix products with the clusters' multinomial weights.

Source: Li et al., "The Devil Is in the Details: Tackling Unimodal Spurious Correlations for Generalizable
Multimodal Reward Models", ICML 2025, arXiv 2503.03122 (accuracy, SFD, SFC).

Dimension key beside the package's: K clusters, B the sample itself and its resamples (row 0 is the sample).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 1000
MIN_CLUSTERS = 10  # fewer say too little of how clusters differ
# An interval is reported only where at least this share of the resamples defines the quantity.
_DEFINED_SHARE = 0.95
# Weights held at once; resamples are drawn in chunks so that large test sets stay within about 100 MB.
_WEIGHTS_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class CellScores:
    """One trained model on one test set; all arrays are [C].

    Attributes:
      objective: what the model was trained with, e.g. "standard".
      train: name of the training environment.
      test: name of the test set.
      seed: of the training run.
      margins: d of every comparison of the test set.
      shortcut_margins: margins of the text-only model of the same training environment and seed, or None.
      clusters: cluster of every comparison; comparisons of one image share a cluster.
      tie: True where the label says the two responses are equal; these count nowhere.
      mean_reward: mean reward over all responses of the test set.
      sfc: Shortcut-Failure Coefficients on the test set, or None.

    Raises:
      ValueError: where an array is not of shape [C]; the message names the cell and the array.
    """

    objective: str
    train: str
    test: str
    seed: int
    margins: Float[np.ndarray, "..."]
    shortcut_margins: Float[np.ndarray, "..."] | None
    clusters: Int[np.ndarray, "..."]
    tie: Bool[np.ndarray, "..."]
    mean_reward: float
    sfc: Float[np.ndarray, "..."] | None

    def __post_init__(self) -> None:
        if self.margins.ndim != 1:
            raise ValueError(f"{self.name}: margins must be one-dimensional, got shape {self.margins.shape}")
        for field in ("shortcut_margins", "clusters", "tie", "sfc"):
            array = getattr(self, field)
            if array is not None and array.shape != self.margins.shape:
                raise ValueError(f"{self.name}: {field} has shape {array.shape}, margins {self.margins.shape}")

    @property
    def name(self) -> str:
        """The cell in words, for messages."""
        return f"{self.objective} trained on {self.train}, seed {self.seed}, tested on {self.test}"


def correctness(margins: Float[np.ndarray, "C"]) -> Float[np.ndarray, "C"]:
    """1 where d > 0, 1/2 where d == 0, 0 where d < 0.

    Raises:
      ValueError: at a NaN or infinite margin, naming its index.
    """
    margins = np.asarray(margins, np.float64)
    bad = np.flatnonzero(~np.isfinite(margins))
    if bad.size:
        raise ValueError(
            f"margin {bad[0]} is {margins[bad[0]]} ({bad.size} of {margins.size} are not finite): "
            "the model's rewards overflowed or training diverged"
        )
    return 0.5 * (1.0 + np.sign(margins))


def _tallies(
    correct: Float[np.ndarray, "C"], counted: Bool[np.ndarray, "C"], shortcut: Float[np.ndarray, "C"] | None
) -> Float[np.ndarray, "C 3 2"]:
    """Per comparison (points, count) in all, in S+ and in S-."""
    neither = np.full(correct.shape, 0.5)
    shortcut = neither if shortcut is None else shortcut
    member = np.stack([counted, counted & (shortcut == 1.0), counted & (shortcut == 0.0)], axis=-1).astype(np.float64)
    return np.stack([member * correct[:, None], member], axis=-1)


def cell_tallies(cell: CellScores) -> Float[np.ndarray, "C 3 2"]:
    """Per comparison (points, count) in all, in S+ and in S-: what every resampled measure is a ratio of.

    S+ and S- are the comparisons that the text-only model gets right and wrong. One at which its margin is exactly 0
    shows neither that the shortcut works nor that it fails, and belongs to neither. Label ties count nowhere.

    Raises:
      ValueError: at a margin that is not finite, naming cell and index.
    """
    try:
        correct = correctness(cell.margins)
        shortcut = None if cell.shortcut_margins is None else correctness(cell.shortcut_margins)
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from error
    return _tallies(correct, ~cell.tie, shortcut)


def named_rng(*name: object) -> np.random.Generator:
    """A generator of its own for whatever has this name: what else is drawn, and in which order, changes nothing."""
    digest = hashlib.sha256("\0".join(map(str, name)).encode(errors="surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def cluster_sums(
    columns: Float[np.ndarray, "C *J"], clusters: Int[np.ndarray, "C"], labels: Int[np.ndarray, "K"]
) -> Float[np.ndarray, "K *J"]:
    """Columns added up per cluster; `labels` are the sorted distinct clusters."""
    sums = np.zeros((labels.size, *columns.shape[1:]))
    np.add.at(sums, np.searchsorted(labels, clusters), columns)
    return sums


def bootstrap_sums(
    sums: Float[np.ndarray, "K *J"], rng: np.random.Generator, resamples: int = RESAMPLES
) -> Float[np.ndarray, "B *J"]:
    """Totals of `sums` over K clusters drawn with replacement. Row 0 is the sample itself, the rest are resamples.

    They are NaN where there are fewer than MIN_CLUSTERS, which say too little of how clusters differ.
    """
    clusters, flat = sums.shape[0], sums.reshape(sums.shape[0], math.prod(sums.shape[1:]))
    totals = np.zeros((resamples + 1, flat.shape[1]))
    totals[0] = flat.sum(axis=0)
    chunk = max(1, _WEIGHTS_AT_ONCE // max(1, clusters))
    for start in range(0, resamples if clusters else 0, chunk):
        rows = min(chunk, resamples - start)
        draws = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        weights = np.bincount(draws.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        totals[1 + start : 1 + start + rows] = weights.astype(np.float64) @ flat
    if clusters < MIN_CLUSTERS:
        totals[1:] = np.nan
    return totals.reshape(resamples + 1, *sums.shape[1:])


def _rates(sums: Float[np.ndarray, "*B 3 2"]) -> Float[np.ndarray, "3 *B"]:
    """Accuracy in all, in S+ and in S- from (points, count); NaN where the count is 0."""
    points, count = sums[..., 0], sums[..., 1]
    rates = np.divide(points, count, out=np.full(points.shape, np.nan), where=count > 0)
    return np.moveaxis(rates, -1, 0)


def accuracy_and_sfd(sums: Float[np.ndarray, "B 3 2"]) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
    """Accuracy and SFD = Acc(S+) - Acc(S-) of every resample; NaN where a side is empty."""
    overall, right, wrong = _rates(sums)
    return overall, right - wrong


def interval(values: Float[np.ndarray, "B"], tail: float = 2.5) -> tuple[float | None, float | None]:
    """The resampled values without `tail` percent at each end: the central 95 %, unless another tail is given.

    (None, None) where over 5 % of the resamples leave it undefined.
    """
    defined = values[~np.isnan(values)]
    if defined.size == 0 or defined.size < _DEFINED_SHARE * values.size:
        return None, None
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def cell_row(cell: CellScores, rng: np.random.Generator, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The cell as one flat, JSON-safe row.

    Accuracies and SFD are fractions; None stands for undefined. `n` counts the comparisons that are no label ties;
    `mean_margin` and `sfc_mean` are over the same ones. The sizes of S+ and S- are None without a text-only model.

    Raises:
      ValueError: at a margin that is not finite, naming cell and index.
    """
    tallies = cell_tallies(cell)
    sums = bootstrap_sums(cluster_sums(tallies, cell.clusters, np.unique(cell.clusters)), rng, resamples)
    overall, degradation = accuracy_and_sfd(sums)
    _, right, wrong = _rates(sums[0])
    low, high = interval(overall[1:])
    sfd_low, sfd_high = interval(degradation[1:])
    has_shortcut = cell.shortcut_margins is not None
    return {
        "objective": cell.objective,
        "train": cell.train,
        "test": cell.test,
        "seed": int(cell.seed),
        "n": int(sums[0, 0, 1]),
        "accuracy": _finite(overall[0]),
        "accuracy_low": low,
        "accuracy_high": high,
        "sfd": _finite(degradation[0]),
        "accuracy_shortcut_right": _finite(right),
        "accuracy_shortcut_wrong": _finite(wrong),
        "n_shortcut_right": int(sums[0, 1, 1]) if has_shortcut else None,
        "n_shortcut_wrong": int(sums[0, 2, 1]) if has_shortcut else None,
        "sfd_low": sfd_low,
        "sfd_high": sfd_high,
        "mean_reward": _finite(cell.mean_reward),
        "mean_margin": _mean(cell.margins[~cell.tie]),
        "sfc_mean": None if cell.sfc is None else _mean(cell.sfc[~cell.tie]),
    }


def _mean(values: Float[np.ndarray, "C"]) -> float | None:
    return _finite(np.mean(values, dtype=np.float64)) if values.size else None


def _finite(value: float | np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None
