"""Accuracy, SFD and their intervals against numbers worked out by hand and known distributions."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from rich.console import Console

from mmrm_jax.eval.metrics import MIN_CLUSTERS, CellScores, cell_row, correctness, interval, named_rng
from mmrm_jax.eval.single_tables import training_table
from mmrm_jax.eval.summary import _seed_weights, cell_kind, format_matrix, mean_over_seeds, summarise
from mmrm_jax.objectives import standard
from mmrm_jax.train.progress import describe

IID = {"a": "ta", "b": "tb"}
ROW_KEYS = [
    "objective", "train", "test", "seed", "n", "accuracy", "accuracy_low", "accuracy_high",
    "sfd", "accuracy_shortcut_right", "accuracy_shortcut_wrong", "n_shortcut_right", "n_shortcut_wrong",
    "sfd_low", "sfd_high", "mean_reward", "mean_margin", "sfc_mean",
]  # fmt: skip


def cell(
    margins, shortcut=None, *, objective="standard", train="a", test="ta", seed=0, clusters=None, tie=None, sfc=None
):
    margins = np.asarray(margins, np.float64)
    n = len(margins)
    return CellScores(
        objective=objective,
        train=train,
        test=test,
        seed=seed,
        margins=margins,
        shortcut_margins=None if shortcut is None else np.asarray(shortcut, np.float64),
        clusters=np.arange(n) if clusters is None else np.asarray(clusters, np.int64),
        tie=np.zeros(n, bool) if tie is None else np.asarray(tie, bool),
        mean_reward=0.25,
        sfc=None if sfc is None else np.asarray(sfc, np.float64),
    )


def row(c, seed=0, resamples=1000):
    return cell_row(c, np.random.default_rng(seed), resamples)


def random_cells(rng, *, seeds=(0, 1, 2), objectives=("standard", "shortcut_aware"), n=120, tests=("ta", "tb", "tn")):
    """Margins with a level per objective, a shared text-only model per train and seed, two comparisons a cluster."""
    cells = []
    for seed in seeds:
        for train in IID:
            for test in tests:
                shortcut = rng.normal(0.5, 1, n)
                for i, objective in enumerate(objectives):
                    margins = rng.normal(0.3 + 0.4 * i, 1, n) + 0.5 * shortcut * (i == 0)
                    cells.append(
                        cell(margins, shortcut, objective=objective, train=train, test=test, seed=seed,
                             clusters=np.arange(n) // 2 + 1000 * tests.index(test))
                    )  # fmt: skip
    return cells


def pick(rows, measure, objective, versus=None):
    (found,) = [r for r in rows if (r["measure"], r["objective"], r["versus"]) == (measure, objective, versus)]
    return found


def test_correctness_and_accuracy_by_hand():
    np.testing.assert_array_equal(correctness(np.array([2.0, -1e-9, 0.0, -0.0, 1e-30])), [1, 0, 0.5, 0.5, 1])
    assert row(cell([1.0, -1.0, 0.0, 3.0]))["accuracy"] == 0.625
    # The label ties (first and third) drop out: one right, one wrong.
    assert row(cell([1.0, -1.0, 0.0, 3.0], tie=[True, False, True, False]))["accuracy"] == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_margins_that_are_not_finite_are_named(bad):
    with pytest.raises(ValueError, match="margin 2 is"):
        correctness(np.array([1.0, 0.0, bad, bad]))
    with pytest.raises(ValueError, match="standard trained on a, seed 0, tested on ta: margin 1"):
        row(cell([0.0, bad]))
    with pytest.raises(ValueError, match="margin 0"):
        summarise([cell([1.0], [bad])], IID, seed=0, resamples=5)


def sfd(margins, shortcut, tie=None):
    """(SFD, Acc(S+), Acc(S-), size of S+, size of S-)"""
    fields = ("sfd", "accuracy_shortcut_right", "accuracy_shortcut_wrong", "n_shortcut_right", "n_shortcut_wrong")
    result = row(cell(margins, shortcut, tie=tie))
    return tuple(result[field] for field in fields)


def test_sfd_by_hand():
    #          S+   S+   S+  neither S-   S-   label tie
    shortcut = [1.0, 2.0, 0.1, 0.0, -1.0, -2.0, 1.0]
    margins = [1.0, 1.0, -1.0, -1.0, 0.0, -1.0, -1.0]
    tie = [False] * 6 + [True]
    # Acc(S+) = 2/3, Acc(S-) = (1/2 + 0)/2 = 1/4.
    assert sfd(margins, shortcut, tie) == (2 / 3 - 1 / 4, 2 / 3, 1 / 4, 3, 2)
    assert sfd(margins, shortcut)[1] == 0.5  # the tie counted would be a fourth member of S+, wrong


def test_sfd_is_undefined_where_a_side_is_empty():
    assert sfd([1.0, -1.0], [1.0, 2.0]) == (None, 0.5, None, 2, 0)
    assert sfd([1.0, -1.0], [-1.0, -2.0]) == (None, None, 0.5, 0, 2)
    assert sfd([1.0], [0.0]) == (None, None, None, 0, 0)
    result = row(cell([1.0, -1.0], [1.0, 2.0]))
    assert (result["sfd"], result["sfd_low"], result["sfd_high"]) == (None, None, None)


def test_the_text_only_model_itself_has_sfd_one():
    assert sfd([1.0, -1.0, 2.0, -0.5], [1.0, -1.0, 2.0, -0.5]) == (1.0, 1.0, 0.0, 2, 2)


def test_cell_row_by_hand_and_json_safe():
    shortcut = [1.0, 1.0, -1.0, -1.0, 1.0]
    result = row(cell([2.0, -1.0, 1.0, 4.0, 9.0], shortcut, tie=[0, 0, 0, 0, 1], sfc=[0.1, 0.2, 0.3, 0.4, 1.0]))
    assert list(result) == ROW_KEYS
    assert (result["n"], result["accuracy"], result["sfd"]) == (4, 0.75, -0.5)
    assert (result["accuracy_shortcut_right"], result["accuracy_shortcut_wrong"]) == (0.5, 1.0)
    assert (result["n_shortcut_right"], result["n_shortcut_wrong"]) == (2, 2)
    assert (result["mean_margin"], result["mean_reward"]) == (1.5, 0.25)
    assert result["sfc_mean"] == pytest.approx(0.25)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_cell_without_text_only_model_and_without_comparisons():
    result = row(cell([1.0, 1.0, -1.0, -1.0]))
    assert (result["accuracy"], result["sfd"], result["n_shortcut_right"], result["sfc_mean"]) == (
        0.5,
        None,
        None,
        None,
    )
    for empty in (row(cell([])), row(cell([1.0], [1.0], tie=[True]))):
        json.dumps(empty, allow_nan=False)
        assert (empty["n"], empty["accuracy"], empty["accuracy_low"], empty["mean_margin"]) == (0, None, None, None)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"tested on ta: clusters has shape \(3,\), margins \(2,\)"):
        cell([1.0, 2.0], clusters=[0, 1, 2])
    with pytest.raises(ValueError, match="one-dimensional"):
        cell([[1.0, 2.0]])


def test_intervals_cover_a_known_bernoulli():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        result = cell_row(cell(np.where(rng.random(150) < 0.7, 1.0, -1.0)), rng, resamples=300)
        covered += result["accuracy_low"] <= 0.7 <= result["accuracy_high"]
    assert 0.90 <= covered / 300 <= 0.985


def test_interval_width_is_the_normal_one():
    result = row(cell(np.where(np.arange(1000) % 4 == 0, -1.0, 1.0)), resamples=4000)
    width = result["accuracy_high"] - result["accuracy_low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.75 * 0.25 / 1000), rel=0.08)


def test_interval_of_sfd_is_the_normal_one():
    margins = np.where(np.arange(1200) % 4 == 0, -1.0, 1.0)
    result = row(cell(margins, np.where(np.arange(1200) < 800, 1.0, -1.0)), resamples=4000)
    width = result["sfd_high"] - result["sfd_low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.75 * 0.25 * (1 / 800 + 1 / 400)), rel=0.08)


def test_duplicates_within_a_cluster_add_nothing():
    rng = np.random.default_rng(1)
    margins, shortcut = rng.normal(0.3, 1, 80), rng.normal(0, 1, 80)
    clusters = np.arange(80) // 2 * 7 - 3  # labels need be neither contiguous nor positive
    once = row(cell(margins, shortcut, clusters=clusters))
    thrice = row(cell(np.tile(margins, 3), np.tile(shortcut, 3), clusters=np.tile(clusters, 3)))
    for key in ("accuracy", "accuracy_low", "accuracy_high", "sfd", "sfd_low", "sfd_high"):
        assert thrice[key] == pytest.approx(once[key], abs=1e-12)
    unclustered = row(cell(np.tile(margins, 3), np.tile(shortcut, 3)))
    assert unclustered["accuracy_high"] - unclustered["accuracy_low"] < 0.75 * (
        once["accuracy_high"] - once["accuracy_low"]
    )


def test_interval_needs_most_resamples_defined():
    values = np.linspace(0, 1, 101)
    assert interval(values) == (0.025, 0.975)
    assert interval(np.append(values, np.full(10, np.nan))) == (None, None)
    assert interval(np.append(values, np.nan)) == (0.025, 0.975)
    assert interval(np.full(3, np.nan)) == (None, None)


def test_bootstrap_is_fast_and_chunked_draws_keep_their_width():
    margins = np.where(np.arange(9000) % 2 == 0, 1.0, -1.0)  # more weights than are held at once
    start = time.perf_counter()
    result = row(cell(margins, margins))
    assert time.perf_counter() - start < 3
    width = result["accuracy_high"] - result["accuracy_low"]
    assert width == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(9000), rel=0.15)


@pytest.mark.parametrize("images", [2, MIN_CLUSTERS - 1, MIN_CLUSTERS])
def test_few_images_leave_no_interval(images):
    """However many another test has; what two images agree in has no p value either."""
    few, many = np.arange(images).repeat(20) % images, np.arange(60)
    cells = [
        cell(sign * np.ones(size), objective=objective, train=train, test=f"t{test}", clusters=clusters)
        for objective, sign in (("standard", -1.0), ("other", 1.0))
        for train in ("a", "b")
        for test, size, clusters in (("a", few.size, few), ("b", many.size, many))
    ]
    enough = images >= MIN_CLUSTERS
    rows = summarise(cells, IID, seed=0, resamples=200)
    (change,) = [row for row in rows if row["measure"] == "iid" and row["versus"]]
    assert change["mean"] == 1.0 and (change["low"] is not None) == (change["p"] is not None) == enough
    assert [row(c)["accuracy_low"] is not None for c in cells[:2]] == [enough, True]


def test_summary_means_by_hand():
    def constant(share, **names):  # `share` of ten comparisons right; the text-only model is right on the first five
        margins = np.where(np.arange(10) < 10 * share, 1.0, -1.0)
        return cell(margins, np.where(np.arange(10) < 5, 1.0, -1.0), **names)

    levels = {
        ("a", "ta"): 1.0,
        ("a", "tb"): 0.5,
        ("a", "tn"): 0.6,
        ("b", "tb"): 0.8,
        ("b", "ta"): 0.3,
        ("b", "tn"): 0.2,
    }
    cells = [constant(level, train=train, test=test) for (train, test), level in levels.items()]
    better = {key: min(level + 0.2, 1.0) for key, level in levels.items()}
    cells += [constant(v, objective="shortcut_aware", train=train, test=test) for (train, test), v in better.items()]
    rows = summarise(cells, IID, seed=0, resamples=200)
    assert pick(rows, "iid", "standard")["mean"] == pytest.approx((1.0 + 0.8) / 2)
    assert pick(rows, "ood", "standard")["mean"] == pytest.approx((0.5 + 0.3) / 2)
    assert pick(rows, "other", "standard")["mean"] == pytest.approx((0.6 + 0.2) / 2)
    # SFD per level: 1.0 -> 0, .5 -> 1, .6 -> .8, .8 -> .4, .3 -> .6, .2 -> .4; and the same 20 points up.
    assert pick(rows, "sfd", "standard")["mean"] == pytest.approx((0 + 1 + 0.8 + 0.4 + 0.6 + 0.4) / 6)
    assert pick(rows, "sfd_ood", "standard")["mean"] == pytest.approx((1 + 0.6) / 2)
    assert pick(rows, "sfd_iid", "standard")["mean"] == pytest.approx((0 + 0.4) / 2)
    aware = (0 + 0.6 + 0.4 + 0 + 1 + 0.8) / 6
    assert pick(rows, "sfd", "shortcut_aware")["mean"] == pytest.approx(aware)
    assert pick(rows, "ood", "shortcut_aware", "standard")["mean"] == pytest.approx(0.2)
    assert pick(rows, "iid", "shortcut_aware", "standard")["mean"] == pytest.approx(0.1)
    assert pick(rows, "sfd_reduction", "shortcut_aware", "standard")["mean"] == pytest.approx(1 - aware / (3.2 / 6))
    fields = {"measure", "objective", "versus", "mean", "low", "high", "seeds"}
    assert all(set(r) == (fields if r["versus"] is None else fields | {"p"}) for r in rows)
    assert all(r["seeds"] == 1 for r in rows)


def test_identical_objectives_differ_by_exactly_zero():
    cells = random_cells(np.random.default_rng(3), objectives=("standard",))
    copies = [CellScores(**{**vars(c), "objective": "copy"}) for c in cells]
    rows = summarise(cells + copies, IID, seed=0, resamples=200)
    differences = [r for r in rows if r["versus"] == "standard"]
    assert len(differences) == 7
    assert all((r["mean"], r["low"], r["high"], r["p"]) == (0.0, 0.0, 0.0, 1.0) for r in differences)
    # and their levels have an interval of some width
    assert pick(rows, "ood", "copy")["low"] < pick(rows, "ood", "copy")["high"]


def test_pairing_makes_the_difference_surer_than_the_levels():
    rng = np.random.default_rng(5)
    cells = []
    for train, test in (("a", "ta"), ("b", "tb")):
        margins = np.where(rng.random(400) < 0.6, 1.0, -1.0)
        better = np.where((margins < 0) & (rng.random(400) < 0.1), 1.0, margins)
        cells += [cell(margins, train=train, test=test), cell(better, objective="better", train=train, test=test)]
    rows = summarise(cells, IID, seed=0)
    level, change = pick(rows, "iid", "better"), pick(rows, "iid", "better", "standard")
    assert change["high"] - change["low"] < 0.5 * (level["high"] - level["low"])
    assert 0 < change["low"] < change["mean"] < change["high"]


def test_seeds_widen_the_interval():
    """Two seeds at 50 % and 100 % say nothing: t of one degree of freedom. The test set alone leaves far less open."""
    half = np.where(np.arange(400) % 2 == 0, 1.0, -1.0)
    rows = summarise([cell(half, seed=0), cell(np.ones(400), seed=9)], IID, seed=0)
    both = pick(rows, "iid", "standard")
    assert both["mean"] == 0.75 and both["seeds"] == 2
    assert (both["low"], both["high"]) == (0.0, 1.0)
    one = pick(summarise([cell(half)], IID, seed=0), "iid", "standard")
    assert one["seeds"] == 1
    assert 0.44 < one["low"] < 0.5 < one["high"] < 0.56


def test_with_few_seeds_intervals_hold_what_they_promise():
    """No difference, and three seeds whose means vary by 8 points: 95 % of the intervals have it in them, 5 % of the
    p-values are below .05. A bootstrap of the seeds has some 80 % there, and 20 %."""
    rng, hits, low = np.random.default_rng(0), 0, 0
    for _ in range(300):
        cells = []
        for seed in range(3):
            for objective, level in zip(("standard", "x"), 0.7 + 0.08 * rng.standard_normal(2)):
                cells.append(cell(np.where(rng.random(1000) < level, 1.0, -1.0), objective=objective, seed=seed))
        row = pick(summarise(cells, IID, resamples=400), "iid", "x", "standard")
        hits += row["low"] <= 0 <= row["high"]
        low += row["p"] < 0.05
    assert 0.92 <= hits / 300 <= 0.985 and 0.01 <= low / 300 <= 0.08


def test_seeds_that_leave_a_measure_undefined_say_nothing_of_how_seeds_vary():
    """SFD is defined in two of four seeds, where text is not always right: as if the other two were not there."""
    right, mixed = np.ones(40), np.where(np.arange(40) % 2 == 0, 1.0, -1.0)
    rng = np.random.default_rng(0)
    some = [cell(np.where(rng.random(40) < 0.7, 1.0, -1.0), mixed, seed=seed) for seed in (1, 3)]
    none = [cell(right, right, seed=seed) for seed in (0, 2)]
    found, alone = (pick(summarise(cells, IID, resamples=400), "sfd", "standard") for cells in ([*some, *none], some))
    assert found == alone and found["seeds"] == 2
    only = pick(summarise([some[0], *none], IID, resamples=400), "sfd", "standard")
    assert only == pick(summarise([some[0]], IID, resamples=400), "sfd", "standard") and only["seeds"] == 1


def test_a_mean_over_seeds_varies_as_student_has_it():
    weights = _seed_weights(4, np.random.default_rng(0), 20_000)
    values = np.array([0.2, 0.5, 0.4, 0.9])
    t = (weights @ values / 4 - values.mean())[1:] / (values.std(ddof=1) / 2)
    assert np.allclose(weights.sum(axis=1), 4) and np.all(weights[0] == 1)
    np.testing.assert_allclose(np.percentile(t, [2.5, 50, 97.5]), [-3.182, 0, 3.182], atol=0.12)


def test_tests_that_show_the_same_images_are_resampled_together():
    """Two tests that are one: their mean is no surer than either; where no image is shared it is."""
    rng = np.random.default_rng(0)
    margins = np.where(rng.random(300) < 0.7, 1.0, -1.0)

    def width(shift: int) -> float:
        tests = (("tb", 0), ("tc", shift))
        iid = {"a": "ta", "b": "tb", "c": "tc"}
        cells = [cell(margins, test=test, clusters=np.arange(300) + by) for test, by in tests]
        row = pick(summarise(cells, iid, resamples=1000), "ood", "standard")
        return row["high"] - row["low"]

    assert width(0) / width(1000) == pytest.approx(2**0.5, rel=0.1)


def test_one_image_has_no_interval():
    one = np.zeros(4, int)
    cells = [cell([-1.0] * 4, clusters=one), cell([1.0] * 4, objective="x", clusters=one)]
    row = pick(summarise(cells, IID), "iid", "x", "standard")
    assert (row["mean"], row["low"], row["high"], row["p"]) == (1.0, None, None, None)
    found = cell_row(cells[0], np.random.default_rng(0))
    assert (found["accuracy"], found["accuracy_low"], found["accuracy_high"]) == (0.0, None, None)


def test_a_mean_has_no_interval_where_one_of_its_cells_has_none():
    """The mean of 90 and 30 % is 60 %; resamples of the first test alone would say 87 to 93."""
    cells = [
        cell(np.where(np.arange(300) < 270, 1.0, -1.0), train="a", test="ta", clusters=np.arange(300)),
        cell(np.where(np.arange(50) < 15, 1.0, -1.0), train="b", test="tb", clusters=np.full(50, 1000)),
    ]
    found = pick(summarise(cells, IID), "iid", "standard")
    assert found["mean"] == pytest.approx(0.6) and (found["low"], found["high"]) == (None, None)


def test_text_only_training_has_no_reduction_of_sfd():
    """Its SFD is 1 by definition, so that against standard training's there is nothing to reduce."""
    cells = [cell([1.0, -1.0]), *(cell([1.0, 1.0], objective=name) for name in ("text_only", "x"))]
    rows = summarise(cells, IID, seed=0, resamples=9)
    assert {r["objective"] for r in rows if r["measure"] == "sfd_reduction"} == {"x"}


def test_summary_leaves_out_what_no_cell_measures_and_keeps_the_undefined():
    rows = summarise([cell([1.0, -1.0]), cell([1.0, 1.0], objective="x")], IID, seed=0, resamples=9)
    assert {r["measure"] for r in rows} == {"iid", "sfd", "sfd_iid", "sfd_reduction"}
    assert pick(rows, "sfd", "standard")["mean"] is None and pick(rows, "sfd", "x", "standard")["mean"] is None
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert summarise([], IID, seed=0) == []


def test_reduction_is_undefined_where_standard_has_no_sfd_to_reduce():
    shortcut = np.tile([1.0, -1.0], 20)
    worse = -shortcut  # right where the text-only model is wrong: SFD -1
    cells = [cell(worse, shortcut), cell(shortcut, shortcut, objective="x")]
    reduction = pick(summarise(cells, IID, seed=0), "sfd_reduction", "x", "standard")
    assert (reduction["mean"], reduction["low"], reduction["high"]) == (None, None, None)


def test_summary_is_reproducible_and_refuses_unpaired_cells():
    cells = random_cells(np.random.default_rng(2))
    first, second = (summarise(cells, IID, seed=4, resamples=50) for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="two cells are named"):
        summarise([*cells, cells[0]], IID, seed=0)
    with pytest.raises(ValueError, match="scored on different comparisons"):
        summarise([cell([1.0]), cell([1.0, 2.0], objective="x")], IID, seed=0)
    with pytest.raises(ValueError, match=r"no i\.i\.d\. test is named for training environment 'c'"):
        summarise([cell([1.0], train="c")], IID, seed=0)


def test_what_else_is_drawn_changes_no_interval():
    cells = random_cells(np.random.default_rng(6))
    rows = summarise(cells, IID, resamples=50)
    turned = summarise(cells[::-1], IID, resamples=50)
    for r in rows:
        other = pick(turned, r["measure"], r["objective"], r["versus"])
        assert other == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in r.items()}
    fewer = summarise([c for c in cells if c.test != "tn"], IID, resamples=50)
    assert pick(fewer, "ood", "standard") == pick(rows, "ood", "standard")
    assert named_rng("a", 1).integers(1 << 40) == named_rng("a", 1).integers(1 << 40)
    assert named_rng("a", 1).integers(1 << 40) != named_rng("a1").integers(1 << 40)


def test_cell_kind():
    assert [cell_kind("a", test, IID) for test in ("ta", "tb", "tn")] == ["iid", "ood", "other"]


def test_mean_over_seeds_skips_the_undefined():
    rows = [row(cell([1.0, -1.0], [1.0, -1.0])), row(cell([1.0, 1.0], [1.0, 1.0], seed=1))]
    (mean,) = mean_over_seeds(rows)
    assert (mean["accuracy"], mean["sfd"], mean["n_shortcut_wrong"], mean["seeds"]) == (0.75, 1.0, 0.5, 2)


def test_tables_for_the_terminal():
    cells = random_cells(np.random.default_rng(8))
    cells += [cell([1.0, -1.0], objective="[red]odd[/red]", test="only")]
    rows = [row(c, resamples=50) for c in cells]
    tables = format_matrix(rows, summarise(cells, IID, seed=0, resamples=50), iid=IID)
    output = io.StringIO()
    console = Console(file=output, width=160, force_terminal=True)
    for table in tables:
        console.print(table)
    printed = output.getvalue()
    assert len(tables) == 4
    own = np.mean([r["accuracy"] for r in rows if (r["objective"], r["train"], r["test"]) == ("standard", "a", "ta")])
    assert f"\x1b[1m{100 * own:.1f}\x1b[0m" in printed  # i.i.d. in bold
    assert "[red]odd[/red]" in printed  # names are text, not markup
    assert "shortcut_aware − standard" in printed
    undefined = {"measure": "sfd", "objective": "standard", "versus": None, "mean": None, "low": None, "high": None}
    empty = {**rows[0], "accuracy": None, "accuracy_low": None, "accuracy_high": None}
    for table in format_matrix([empty], [undefined | {"seeds": 1}], iid=IID):
        console.print(table)
    assert "– to –" not in output.getvalue() and "[–" not in output.getvalue()


def test_what_a_held_out_part_leaves_undefined_is_a_dash_and_not_a_number() -> None:
    """Ties alone: there is no accuracy to show while training goes on, nor at its end."""
    row = cell_row(cell([0.5, -0.5], tie=[True, True]), np.random.default_rng(0))
    assert row["accuracy"] is None and row["n"] == 0
    entry = {"step": 2, "seconds": 1.0, "groups": 4, "loss": 0.7, "primary/accuracy": 0.5}
    entry |= {f"validation/{name}": value for name, value in row.items()}
    assert "primary 50.0 %" in describe(entry) and "validation" not in describe(entry)
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(training_table(standard(), [entry]))
    text = console.export_text()
    assert "50.0 %" in text and "n = 0" in text and "None" not in text
