"""A benchmark's own metrics: accuracy overall, by category and averaged over categories, and Acc+ over questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mmrm_jax.eval.metrics import MIN_CLUSTERS, bootstrap_sums, cluster_sums, correctness, interval, named_rng

RESAMPLES = 1000
OVERALL, MACRO, ALL_OF_A_QUESTION = "overall", "macro", "Acc+"


def length_margins(pairs: Sequence[tuple[str, str]]) -> Float[np.ndarray, " C"]:
    """How many characters the better answer has more than the other: the baseline that the longer one wins."""
    return np.asarray([len(better) - len(worse) for better, worse in pairs], np.float64)


def metric_rows(
    margins: Mapping[str, Float[np.ndarray, " C"]],
    categories: Sequence[str],
    questions: Sequence[str | None],
    clusters: Int[np.ndarray, " C"],
    *,
    by_question: bool,
) -> list[dict[str, Any]]:
    """One row a judge and metric: {"judge", "metric", "n", "accuracy", "low", "high"}, fractions.

    A margin of 0 counts half, and for Acc+ as wrong; a pair without a question, since others of it are missing, does
    not count there. Intervals are 95 % bootstrap intervals over `clusters`, pairs with an image in common, where there
    are MIN_CLUSTERS of them.
    """
    names = sorted(set(categories))
    members = np.asarray([[category == name for name in names] for category in categories], np.float64)
    rows = []
    for judge, d in margins.items():
        right = correctness(d)
        points, counts = members * right[:, None], members
        sums = cluster_sums(np.stack([points, counts], axis=2), clusters, np.unique(clusters))
        drawn = bootstrap_sums(sums, named_rng("bench", judge), RESAMPLES)
        by_category = _ratio(drawn[..., 0], drawn[..., 1])
        by_category[1:, (sums[..., 1] > 0).sum(axis=0) < MIN_CLUSTERS] = np.nan
        rows += [_row(judge, name, int(members[:, i].sum()), by_category[:, i]) for i, name in enumerate(names)]
        total = drawn.sum(axis=1)
        rows.append(_row(judge, OVERALL, len(d), _ratio(total[:, 0], total[:, 1])))
        if len(names) > 1:
            rows.append(_row(judge, MACRO, len(names), by_category.mean(axis=1)))
        if by_question and any(question is not None for question in questions):
            rows.append(_all_right(judge, right == 1.0, questions))
    return rows


def _all_right(judge: str, right: Bool[np.ndarray, " C"], questions: Sequence[str | None]) -> dict[str, Any]:
    """How many questions have all their pairs right; resampled by question."""
    known = [i for i, question in enumerate(questions) if question is not None]
    names, place = np.unique([str(questions[i]) for i in known], return_inverse=True)
    whole = np.ones(len(names))
    np.minimum.at(whole, place, right[known].astype(np.float64))
    drawn = bootstrap_sums(whole[:, None], named_rng("bench", judge, ALL_OF_A_QUESTION), RESAMPLES)[:, 0] / len(names)
    return _row(judge, ALL_OF_A_QUESTION, len(names), drawn)


def _ratio(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(points, counts, out=np.full(points.shape, np.nan), where=counts > 0)


def _row(judge: str, metric: str, n: int, drawn: Float[np.ndarray, " B"]) -> dict[str, Any]:
    low, high = interval(drawn[1:])
    return {"judge": judge, "metric": metric, "n": n, "accuracy": float(drawn[0]), "low": low, "high": high}
