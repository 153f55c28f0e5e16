"""What a cross-distribution matrix says as a whole: means, differences against standard training, intervals, tables.

Intervals come from a hierarchical paired bootstrap. Clusters (images) are resampled, together in tests that show the
same ones. Where there are several seeds, means over them vary as Student's t has it: a bootstrap of three seeds has two
thirds of their variance, and none of the doubt about it. One draw serves all objectives, training environments and
seeds, so what they share cancels in their differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rich.table import Table
from rich.text import Text

from mmrm_jax.eval.metrics import (
    MIN_CLUSTERS,
    RESAMPLES,
    CellScores,
    accuracy_and_sfd,
    bootstrap_sums,
    cell_tallies,
    cluster_sums,
    interval,
    named_rng,
)

BASELINE = "standard"
# measure -> (quantity, where): the mean of the quantity over the cells of that kind, or over all cells.
_MEASURES: dict[str, tuple[str, str | None]] = {
    "iid": ("accuracy", "iid"),
    "ood": ("accuracy", "ood"),
    "other": ("accuracy", "other"),
    "sfd": ("sfd", None),
    "sfd_iid": ("sfd", "iid"),
    "sfd_ood": ("sfd", "ood"),
}
MEASURE_NAMES = {
    "iid": "i.i.d. accuracy",
    "ood": "o.o.d. accuracy",
    "other": "accuracy on other tests",
    "sfd": "SFD",
    "sfd_iid": "SFD, i.i.d.",
    "sfd_ood": "SFD, o.o.d.",
    "sfd_reduction": "relative SFD reduction",
}


class _Key(NamedTuple):
    train: str
    test: str
    seed: int


_Values = dict[_Key, Float[np.ndarray, "B"]]  # a quantity of one objective: per cell the value, then its resamples


def cell_kind(train: str, test: str, iid: Mapping[str, str]) -> str:
    """ "iid" on the environment's own test, "ood" on the test of another training environment, else "other".

    Raises:
      ValueError: where `iid` names no test for `train`.
    """
    if train not in iid:
        raise ValueError(f"no i.i.d. test is named for training environment {train!r}; named are {sorted(iid)}")
    if iid[train] == test:
        return "iid"
    return "ood" if test in iid.values() else "other"


def summarise(
    cells: Sequence[CellScores],
    iid: Mapping[str, str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[dict[str, Any]]:
    """Means per objective and paired differences against standard training, each with a 95 % interval.

    Measures: "iid" (mean over training environments on their own test), "ood" (mean over training environments and
    the tests of the others), "other" (tests of no training environment), "sfd" (mean over all cells where it is
    defined), "sfd_iid", "sfd_ood", and "sfd_reduction" = 1 - sfd / sfd of standard, where the latter is positive.
    A mean is first taken within each seed, then over seeds. Comparisons with standard use the cells both have.

    Args:
      cells: one for every objective, train, test and seed.
      iid: training environment -> its own i.i.d. test.
      seed: of the resampling; tests that share images have a generator of their own, named by them.
      resamples: number of bootstrap resamples.

    Returns:
      Rows {"measure", "objective", "versus": None | "standard", "mean", "low", "high", "seeds"}, these those that
      define the measure, and of differences "p", the two-sided bootstrap p-value; a measure no cell belongs to is left
      out, an undefined one is None. With one seed the interval holds for that trained model; with two or three it is
      wide, since so few say little of how runs vary.

    Raises:
      ValueError: at two cells of one name, at cells of one test and seed with different comparisons, at a training
        environment without an i.i.d. test, and at margins that are not finite.
    """
    _check(cells)
    quantities = _resample(cells, seed, resamples)
    seeds = sorted({cell.seed for cell in cells})
    weights = {count: _seed_weights(count, named_rng(seed, "seeds"), resamples) for count in range(1, len(seeds) + 1)}
    rows: list[dict[str, Any]] = []
    for measure, (quantity, kind) in _MEASURES.items():
        by_objective: dict[str, _Values] = {}
        for (objective, key), values in quantities[quantity].items():
            if kind is None or cell_kind(key.train, key.test, iid) == kind:
                by_objective.setdefault(objective, {})[key] = values
        for objective, values in by_objective.items():
            rows.append(_row(measure, objective, None, values, _mean(values, weights)))
        rows += _against_baseline(measure, by_objective, weights)
    return rows


def _check(cells: Sequence[CellScores]) -> None:
    names: set[str] = set()
    tests: dict[tuple[str, int], CellScores] = {}
    for cell in cells:
        if cell.name in names:
            raise ValueError(f"two cells are named {cell.name!r}; give each run its own seed")
        names.add(cell.name)
        first = tests.setdefault((cell.test, cell.seed), cell)
        if not (np.array_equal(first.clusters, cell.clusters) and np.array_equal(first.tie, cell.tie)):
            raise ValueError(
                f"'{cell.name}' and '{first.name}' were scored on different comparisons; "
                "a paired comparison needs the same test set in the same order"
            )


def _seed_weights(seeds: int, rng: np.random.Generator, resamples: int) -> Float[np.ndarray, "B S"]:
    """Weights under which the mean of S numbers is their mean plus t s / sqrt(S), with t of S - 1 degrees of freedom
    and s their standard deviation; equal ones in row 0, and of a single seed."""
    weights = np.ones((resamples + 1, seeds))
    if seeds > 1:
        normal = rng.standard_normal((resamples, seeds))
        normal -= normal.mean(axis=1, keepdims=True)
        weights[1:] += normal * np.sqrt(seeds / rng.chisquare(seeds - 1, (resamples, 1)))
    return weights


def _sharing(labels: Mapping[str, Int[np.ndarray, "K"]]) -> list[list[str]]:
    """Tests in groups, sorted, of which no two share a cluster."""
    groups: list[tuple[list[str], set[int]]] = []
    for test, own in labels.items():
        members, clusters = [test], set(own.tolist())
        apart = []
        for group in groups:
            if clusters.isdisjoint(group[1]):
                apart.append(group)
            else:
                members, clusters = members + group[0], clusters | group[1]
        groups = [*apart, (members, clusters)]
    return [sorted(members) for members, _ in groups]


def _resample(
    cells: Sequence[CellScores], seed: int, resamples: int
) -> dict[str, dict[tuple[str, _Key], Float[np.ndarray, "B"]]]:
    """Accuracy and SFD of every cell under one draw of clusters for all tests that share any."""
    quantities: dict[str, dict[tuple[str, _Key], np.ndarray]] = {"accuracy": {}, "sfd": {}}
    tests: dict[str, list[np.ndarray]] = {}
    for cell in cells:
        tests.setdefault(cell.test, []).append(cell.clusters)
    for names in _sharing({test: np.unique(np.concatenate(each)) for test, each in tests.items()}):
        members = [cell for cell in cells if cell.test in names]
        labels = np.unique(np.concatenate([cell.clusters for cell in members]))
        sums = np.stack([cluster_sums(cell_tallies(cell), cell.clusters, labels) for cell in members], axis=1)
        totals = bootstrap_sums(sums, named_rng(seed, "test", *names), resamples)
        for i, cell in enumerate(members):
            key = (cell.objective, _Key(cell.train, cell.test, cell.seed))
            if np.unique(cell.clusters).size < MIN_CLUSTERS:  # however many the others have
                totals[1:, i] = np.nan
            quantities["accuracy"][key], quantities["sfd"][key] = accuracy_and_sfd(totals[:, i])
    order = [(cell.objective, _Key(cell.train, cell.test, cell.seed)) for cell in cells]
    return {name: {key: values[key] for key in order} for name, values in quantities.items()}


def _against_baseline(
    measure: str, by_objective: dict[str, _Values], weights: Mapping[int, Float[np.ndarray, "B S"]]
) -> list[dict[str, Any]]:
    """Paired differences of every other objective against standard, and for "sfd" also the relative reduction."""
    rows = []
    baseline = by_objective.get(BASELINE, {})
    for objective, values in by_objective.items():
        difference = {key: values[key] - baseline[key] for key in values if key in baseline}
        if objective == BASELINE or not difference:
            continue
        mean = _mean(difference, weights)
        rows.append(_row(measure, objective, BASELINE, difference, mean))
        if measure == "sfd" and objective != "text_only":  # whose SFD is 1 by definition
            # The baseline's mean over just the cells and resamples at which the difference is defined too.
            base = _mean(
                {key: np.where(np.isnan(difference[key]), np.nan, baseline[key]) for key in difference}, weights
            )
            reduction = np.divide(-mean, base, out=np.full(mean.shape, np.nan), where=base > 0)
            rows.append(_row("sfd_reduction", objective, BASELINE, difference, reduction))
    return rows


def _seeds(values: _Values) -> list[int]:
    """Those with a cell that is defined: no others say how seeds vary."""
    return sorted({key.seed for key, column in values.items() if not np.isnan(column[0])})


def _mean(values: _Values, weights: Mapping[int, Float[np.ndarray, "B S"]]) -> Float[np.ndarray, "B"]:
    """Mean over each seed's defined cells, then over seeds with the weights of so many.

    NaN where no cell is defined, and in resamples that leave one undefined: a mean of fewer cells is another quantity.
    """
    seeds = _seeds(values)
    if not seeds:
        return np.full(next(iter(values.values())).shape, np.nan)
    defined = [(key.seed, column) for key, column in values.items() if not np.isnan(column[0])]
    by_seed = [np.mean([column for seed, column in defined if seed == each], axis=0) for each in seeds]
    return np.mean(np.stack(by_seed, axis=1) * weights[len(seeds)], axis=1)


def _row(measure: str, objective: str, versus: str | None, cells: _Values, mean: np.ndarray) -> dict[str, Any]:
    # Seeds that differ much leave more open than there can be: accuracies lie in 0 to 1, SFD and differences of
    # accuracies in -1 to 1, differences of SFD in -2 to 2.
    most = np.inf if measure == "sfd_reduction" else 2.0 if versus and measure.startswith("sfd") else 1.0
    least = 0.0 if versus is None and not measure.startswith("sfd") else -most
    low, high = interval(np.clip(mean[1:], least, most))
    row = {
        "measure": measure,
        "objective": objective,
        "versus": versus,
        "mean": None if np.isnan(mean[0]) else float(mean[0]),
        "low": low,
        "high": high,
        "seeds": len(_seeds(cells)),
    }
    return row if versus is None else row | {"p": None if low is None else _p_value(mean[1:])}


def _p_value(resampled: Float[np.ndarray, "B"]) -> float:
    """Two-sided, of no difference: twice the smaller share of resamples on either side of 0, which counts to both."""
    defined = resampled[~np.isnan(resampled)]
    beyond = min(np.sum(defined <= 0), np.sum(defined >= 0))
    return float(min(1.0, 2 * (1 + beyond) / (1 + defined.size)))


def mean_over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per (objective, train, test): every number averaged over the seeds that define it, and "seeds".

    The bounds are averages of the seeds' bounds, so they show what the size of the test set leaves open for one
    trained model; intervals over seeds are in `summarise`.
    """
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["objective"], row["train"], row["test"]), []).append(row)
    averaged = []
    for (objective, train, test), members in cells.items():
        mean: dict[str, Any] = {"objective": objective, "train": train, "test": test, "seeds": len(members)}
        for field in members[0]:
            if field not in ("objective", "train", "test", "seed"):
                defined = [row[field] for row in members if row.get(field) is not None]
                mean[field] = sum(defined) / len(defined) if defined else None
        averaged.append(mean)
    return averaged


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal; a dash where undefined."""
    return "–" if value is None else f"{100 * value:.1f}".replace("-", "−")


def points(value: float | None) -> str:
    """A difference of fractions in percentage points with a sign; a dash where undefined."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def between(low: float | None, high: float | None, show: Callable[[float | None], str]) -> str:
    """An interval, "LOW to HIGH"; nothing where there is none."""
    return "" if low is None else f"{show(low)} to {show(high)}"


def format_matrix(
    rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], *, iid: Mapping[str, str]
) -> list[Table]:
    """Tables for a terminal: accuracy in percent per objective (train by test, i.i.d. in bold), then the summary.

    Args:
      rows: cell rows of `metrics.cell_row`; several seeds are averaged.
      summary: rows of `summarise`.
      iid: training environment -> its own i.i.d. test.
    """
    means = mean_over_seeds(rows)
    tests = list(dict.fromkeys(row["test"] for row in means))
    tables = []
    for objective in dict.fromkeys(row["objective"] for row in means):
        cells = {(row["train"], row["test"]): row for row in means if row["objective"] == objective}
        table = Table(title=Text(f"{objective}: accuracy in %"), title_justify="left")
        table.add_column("trained on \\ tested on")
        for test in tests:
            table.add_column(Text(test), justify="right")
        for train in dict.fromkeys(train for train, _ in cells):
            table.add_row(
                Text(train), *(_cell_text(cells.get((train, test)), iid.get(train) == test) for test in tests)
            )
        tables.append(table)
    return [*tables, _summary_table(summary)]


def _cell_text(row: Mapping[str, Any] | None, bold: bool) -> Text:
    if row is None:
        return Text("")
    low, high = row["accuracy_low"], row["accuracy_high"]
    bounds = "" if low is None else f" [{percent(low)}, {percent(high)}]"
    return Text.assemble((percent(row["accuracy"]), "bold" if bold else ""), (bounds, "dim"))


def _summary_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Summary in %, with 95 % intervals", title_justify="left")
    for column in ("measure", "objective", "mean", "95 % interval", "seeds"):
        table.add_column(column, justify="left" if column in ("measure", "objective") else "right")
    for row in summary:
        # A difference is in signed points; a level and the relative reduction are plain percentages.
        difference = row["versus"] is not None and row["measure"] != "sfd_reduction"
        show = points if difference else percent
        versus = f" − {row['versus']}" if difference else ""
        table.add_row(
            MEASURE_NAMES[row["measure"]],
            Text(row["objective"] + versus),
            show(row["mean"]),
            between(row["low"], row["high"], show) or "–",
            str(row["seeds"]),
        )
    return table
