"""What an ablation says: differences from standard training at every point, corrected for their number, and costs.

Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmrm_jax.ablate.grid import Point
from mmrm_jax.eval.matrix import Matrix, forward_passes, scores
from mmrm_jax.eval.metrics import CellScores
from mmrm_jax.eval.summary import BASELINE, summarise

TESTED = ("iid", "ood", "other", "sfd")  # the measures that comparisons with standard are corrected within


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One point of the grid with what was run there; `cells` are its models, those of a borrowed baseline included."""

    point: Point
    matrix: Matrix
    cells: list[CellScores]


def outcomes(points: Sequence[Point], matrices: Sequence[Matrix]) -> list[Outcome]:
    """The cells of every point. One without standard training is compared with that of the first point that has it,
    where the tests are the same."""
    found: list[Outcome] = []
    for point, matrix in zip(points, matrices, strict=True):
        cells = list(scores(matrix))
        lender = next((o for o in found if BASELINE in o.matrix.config.objectives), None)
        if BASELINE not in matrix.config.objectives and lender is not None and _same_tests(lender.cells, cells):
            cells += [cell for cell in lender.cells if cell.objective == BASELINE]
        found.append(Outcome(point, matrix, cells))
    return found


def _same_tests(a: Sequence[CellScores], b: Sequence[CellScores]) -> bool:
    tests = {(cell.test, cell.seed): cell for cell in a}
    return all(
        (cell.test, cell.seed) in tests and np.array_equal(tests[cell.test, cell.seed].clusters, cell.clusters)
        for cell in b
    )


def summary_rows(found: Sequence[Outcome], resamples: int) -> list[dict[str, Any]]:
    """`summarise` of every point, with "setting" and, for differences, "p" and "p_holm".

    "p" is the two-sided bootstrap p-value of no difference, "p_holm" that after Holm's correction within the measure,
    over all objectives and points. Only the measures in `TESTED` are corrected; others have None.
    """
    rows = []
    for outcome in found:
        own = set(outcome.matrix.config.objectives)
        for row in summarise(outcome.cells, outcome.matrix.data.iid, resamples=resamples):
            if row["objective"] in own:
                rows.append({"setting": outcome.point.name, "p": None, **row, "p_holm": None})
    for measure in TESTED:
        tested = [
            row
            for row in rows
            if row["measure"] == measure and row["p"] is not None and row["objective"] != "text_only"
        ]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = p
    return rows


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: max over the smaller ones of (m - rank) * p, at most 1."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def cost_rows(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What each objective took at each point.

    "forwards" is forward passes a step, those of a run before included; "seconds" the median over its runs of the time
    they trained, compilation included, which few of them have; "versus" that over standard training's.
    """
    rows = []
    for outcome in found:
        seconds: dict[str, list[float]] = {}
        for result in outcome.matrix.results:
            seconds.setdefault(result.cell.objective, []).append(result.seconds)
        medians = {objective: float(np.median(values)) for objective, values in seconds.items()}
        for objective, median in medians.items():
            base = medians.get(BASELINE)
            rows.append(
                {
                    "setting": outcome.point.name,
                    "objective": objective,
                    "forwards": forward_passes(objective),
                    "seconds": median,
                    "versus": None if not base else median / base,
                    "runs": len(seconds[objective]),
                }
            )
    return rows
