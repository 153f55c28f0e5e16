"""`mmrm ablate`: the grid, what is corrected and how, the table in its forms, and a small one from end to end."""

from __future__ import annotations

import csv
import io
import json
import weakref

import numpy as np
import pytest
from commands import FAST, run, write_pairs

from mmrm_jax.ablate.grid import points, with_field
from mmrm_jax.ablate.page import axis_name, write_page
from mmrm_jax.ablate.statistics import holm
from mmrm_jax.ablate.tables import as_csv, as_latex, as_markdown, legend, table_rows, terminal_table
from mmrm_jax.config import AblateConfig, ShapesConfig
from mmrm_jax.eval import matrix
from mmrm_jax.eval.matrix import forward_passes
from mmrm_jax.train.program import build_program

pytestmark = pytest.mark.usefixtures("one_device")


def test_every_combination_is_a_point() -> None:
    grid = ("shapes.label_noise=0,0.25", "matrix.train.proxy_input=absent,blank", "matrix.train.steps=None")
    found = points(AblateConfig(grid=grid))
    assert [p.name for p in found] == [
        f"label_noise={noise}, proxy_input={view}, steps=None" for noise in (0.0, 0.25) for view in ("absent", "blank")
    ]
    last = found[-1].config
    assert (last.shapes.label_noise, last.matrix.train.proxy_input, last.matrix.train.steps) == (0.25, "blank", None)
    assert found[0].folder == "label_noise=0.0--proxy_input=absent--steps=None"
    lists = points(AblateConfig(grid=("matrix.train.freeze=(),vision,vision+projector", "matrix.train.strict=true")))
    assert [p.config.matrix.train.freeze for p in lists] == [(), ("vision",), ("vision", "projector")]
    assert [p.name for p in lists] == [f"freeze={parts}, strict=True" for parts in ("()", "vision", "vision+projector")]
    (only,) = points(AblateConfig())
    assert (only.name, only.folder, only.config) == ("", "all", AblateConfig())
    assert with_field(AblateConfig(), "shapes.comparisons", 9).shapes == ShapesConfig(9)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("shapes.label_noise", "must be FIELD=VALUE"),
        ("shapes.label_nose=0.1", "ShapesConfig has no field 'label_nose'; it has label_noise"),
        ("matrix.train=1", "train is no single value: name a field of it"),
        ("resamples=1,2", "of the whole ablation"),
        ("matrix.train.seed.x=1", "seed holds no fields"),
        ("matrix.train.proxy_input=white", "must be one of absent, blank"),
        ("matrix.train.steps=many", "steps is 'many', which is no int"),
        ("matrix.train.strict=1", "strict is '1', which is neither true nor false"),
        ("label_noise=0.1", "AblateConfig has no field 'label_noise'; it has matrix, shapes, grid, resamples"),
        ("label_noise=0.1", "do you mean shapes.label_noise?"),
        ("matrix.batch_size=8", "do you mean matrix.train.batch_size?"),
        ("shapes.label_noise=2", "label_noise is 2.0; it must be from 0 to 1"),
        ("shapes.label_noise=0.1,0.1", "two points of the grid have one name"),
    ],
)
def test_axes_that_are_none(axis: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        points(AblateConfig(grid=(axis,)))
    assert message in str(error.value)


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04: times 4, 3, 2, 1 gives .04 .06 .06 .04, and none is below the one before.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_forward_passes() -> None:
    assert forward_passes("standard") == 1 and forward_passes("shortcut_aware") == 2
    assert forward_passes("text_filtered:folds=3") == 4 and forward_passes("jtt:share=0.5") == 1.5


def some_rows() -> list[dict]:
    def row(objective: str, measure: str, mean: float, versus: str | None = None, p: float | None = None) -> dict:
        found = {"setting": "", "measure": measure, "objective": objective, "versus": versus, "mean": mean}
        return found | {"low": mean - 0.01, "high": mean + 0.01, "seeds": 3, "p": p, "p_holm": p}

    summary = [row("standard", "iid", 0.9), row("a|b_c", "iid", 0.88), row("standard", "ood", 0.6)]
    summary += [row("a|b_c", "ood", 0.7), row("a|b_c", "ood", 0.1, "standard", 0.01)]
    summary += [row("a|b_c", "iid", -0.02, "standard", 0.2)]
    costs = [{"setting": "", "objective": "a|b_c", "forwards": 2, "seconds": 3.0, "versus": 1.5, "runs": 9}]
    return table_rows(summary, costs)


def test_one_table_in_four_forms() -> None:
    rows = some_rows()
    lines = as_markdown(rows).splitlines()
    assert lines[0] == ("| objective | i.i.d. | o.o.d. | i.i.d. − standard | o.o.d. − standard | forwards | time |")
    assert lines[2] == "| standard | 90.0 | 60.0 | – | – | – | – |"
    assert lines[3] == (r"| a\|b_c | 88.0 | 70.0 | −2.0 (−3.0 to −1.0) | +10.0* (+9.0 to +11.0) | 2 | 1.50× |")
    latex = as_latex(rows, "A & B")
    assert r"a|b\_c & 88.0" in latex and r"+10.0* (+9.0 to +11.0)" in latex and r"\caption{A \& B. In" in latex
    back = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert float(back[1]["ood_change"]) == pytest.approx(0.1) and back[0]["ood_change"] == ""
    assert float(back[1]["ood_p"]) == 0.01 and float(back[1]["cost"]) == 1.5
    assert lines[-1] == legend(rows) and "One seed" not in legend(rows) and "other" not in legend(rows)
    alone = legend([row | {"seeds": 1, "other": 0.5} for row in rows])
    assert "other: tests of no training environment. One seed: intervals and stars are of these" in alone
    assert "intervals" not in legend(rows, intervals=False)
    assert terminal_table(rows, "").row_count == 2 and terminal_table(rows, "other").row_count == 0


def test_programs_that_are_no_longer_used_are_forgotten(capsys, monkeypatch, tmp_path) -> None:
    """A process may have 65,530 memory mappings, and a compiled program takes thousands."""
    built: list[str] = []
    programs: list[weakref.ref] = []

    def build(model, config, steps, **fields):
        program = build_program(model, config, steps, **fields)
        if steps > 1:  # not the ones that only check the set-up
            built.append(config.objective)
            programs.append(weakref.ref(program))
            assert sum(each() is not None for each in programs) <= 2  # this one, and the one that it takes the place of
        return program

    monkeypatch.setattr(matrix, "PROGRAMS", 1)
    monkeypatch.setattr(matrix, "build_program", build)
    for name in ("a", "ta"):
        write_pairs(tmp_path, name, 8)
    command = ["matrix", "--env", "A=a.jsonl,ta.jsonl", "--root", tmp_path, "--out", tmp_path / "out", *FAST]
    command += [
        "--train.steps",
        2,
        "--train.data.buckets",
        1,
        "--seeds",
        2,
        "--objectives",
        "standard",
        "focal",
        "--modifiers",
        "centring",
    ]
    status, text = run(capsys, *command)
    assert status == 0 and built == ["standard+centring", "focal+centring"], text  # each once, for both seeds
    assert "Every objective is trained with centring." in text
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["objective"] for row in rows} == {"standard", "focal"}


def test_points_of_a_grid_have_names_of_their_own_in_figures_and_text_only_is_no_method(tmp_path) -> None:
    (row,) = [r for r in some_rows() if r["objective"] == "a|b_c"]
    grid = [row | {"objective": "shortcut_aware", "setting": f"label_noise={share}"} for share in (0.1, 0.2)]
    assert [axis_name(r) for r in grid] == [f"shortcut_aware\nlabel_noise={share}" for share in (0.1, 0.2)]
    assert axis_name(row) == "a|b_c"
    best = row | {"objective": "text_only", "ood_change": 0.5, "ood_p": None}
    write_page(tmp_path / "r.html", "x", "y", {}, [*grid, best], {})
    page = (tmp_path / "r.html").read_text()
    assert "Out of distribution 2 of 2 are better" in page and "The highest is shortcut_aware" in page
    assert r"\textbackslash{}a\{b\}\^{}" in as_latex([row | {"objective": r"\a{b}^"}], "x")


def test_what_is_turned_round_is_marked(tmp_path) -> None:
    rows = some_rows()
    rows[1] |= {"iid": 0.1, "other": 0.5, "other_change": -0.1, "other_change_low": -0.2, "other_change_high": -0.05}
    lines = as_markdown(rows).splitlines()
    assert "other − standard" in lines[0]
    assert lines[3].startswith(r"| a\|b_c † |") and "−10.0 (−20.0 to −5.0)" in lines[3]
    assert r"a|b\_c $\dagger$" in as_latex(rows, "x")
    write_page(tmp_path / "r.html", "x", "y", {}, rows, {})
    assert "a|b_c: worse than chance in distribution" in (tmp_path / "r.html").read_text()


def test_one_training_environment_has_a_report_of_other_tests(tmp_path) -> None:
    def row(objective: str, measure: str, mean: float, versus: str | None = None) -> dict:
        found = {"setting": "", "measure": measure, "objective": objective, "versus": versus, "mean": mean}
        return found | {"low": mean - 0.01, "high": mean + 0.01, "seeds": 1, "p": 0.01, "p_holm": 0.01}

    summary = [row(o, m, 0.5 + i / 10) for i, o in enumerate(("standard", "focal")) for m in ("iid", "other")]
    summary += [row("focal", measure, 0.1, "standard") for measure in ("iid", "other")]
    costs = [{"setting": "", "objective": "focal", "forwards": 2, "seconds": 3.0, "versus": 1.5, "runs": 9}]
    rows = table_rows(summary, costs)
    write_page(tmp_path / "r.html", "x", "y", {}, rows, {})
    page = (tmp_path / "r.html").read_text()
    assert "On other tests 1 of 1 are better than standard training" in page and "o.o.d. − standard" not in page
    assert "The highest is focal: +10.0 points, in distribution +10.0 points." in page
    assert "Nothing." not in page and "No times." not in page and page.count("data:image/png") == 3
    assert "One seed: intervals and stars are of these trained models" in page and ".." not in legend(rows)


def test_a_small_ablation_and_again(capsys, tmp_path) -> None:
    for i, name in enumerate(["a", "b", "ta", "tb"]):
        write_pairs(tmp_path, name, 16, seed=i)
    out = tmp_path / "out"
    command = ["ablate", "--env", "A=a.jsonl,ta.jsonl", "B=b.jsonl,tb.jsonl", "--matrix.root", tmp_path]
    command += ["--matrix.out", out, "--matrix.train.steps", 2, "--matrix.train.batch-size", 8]
    command += ["--matrix.train.data.buckets", 1, "--matrix.train.eval-batch-size", 8, "--resamples", 200]
    objectives = ["--matrix.objectives", "standard", "shortcut_aware", "text_only"]
    grid = ["--grid", "matrix.train.seed=0,1"]
    status, text = run(capsys, *command, *objectives, *grid)
    assert status == 0 and "point 2 of 2: seed=1" in text, text
    first = json.loads((out / "results.json").read_text())
    assert [(r["setting"], r["objective"]) for r in first["table"]] == [
        (f"seed={seed}", o) for seed in (0, 1) for o in ("standard", "shortcut_aware", "text_only")
    ]
    changed = [r for r in first["summary"] if r["versus"] and r["measure"] == "ood"]
    assert len(changed) == 4 and all(0 < r["p"] <= 1 for r in changed)
    assert all(r["p_holm"] >= r["p"] for r in changed if r["objective"] == "shortcut_aware")
    assert first["facts"]["code"].startswith("0.") and "source" in first["facts"]["code"]
    page = (out / "report.html").read_text()
    assert "<script" not in page and "seed=0/report.html" in page
    assert (out / "seed=0" / "report.html").exists()

    finished = {p: p.stat().st_mtime_ns for p in out.rglob("cell.json")}
    assert len(finished) == 2 * 2 * 2
    status, text = run(capsys, *command, *objectives, *grid)
    again = json.loads((out / "results.json").read_text())
    assert status == 0 and (again["table"], again["summary"]) == (first["table"], first["summary"])
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
