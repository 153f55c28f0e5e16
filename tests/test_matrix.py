"""The bookkeeping of the cross-distribution matrix: what runs where, in which order results come back, what ends."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmrm_jax.config import DataConfig, MatrixConfig, TrainConfig
from mmrm_jax.data.pipeline import EncodedSource
from mmrm_jax.data.sources import MemorySource
from mmrm_jax.eval import matrix
from mmrm_jax.eval.evaluate import Evaluation, image_clusters
from mmrm_jax.eval.matrix import (
    Cell,
    CellResult,
    Matrix,
    all_cells,
    cell_config,
    check_matrix,
    forward_passes,
    read_cell,
    share_out,
    write_cell,
)
from mmrm_jax.eval.matrix_data import Data
from mmrm_jax.eval.publish import modified, publish
from mmrm_jax.eval.running import Running, TableProgress, accuracies
from mmrm_jax.objectives import OBJECTIVES
from mmrm_jax.train.checkpoint import CheckpointError
from mmrm_jax.train.progress import make_progress
from mmrm_jax.types import Comparison, Group, Quarantined

pytestmark = pytest.mark.usefixtures("one_device")


def make_group(index: int, image: Path | bytes | None, prompt: str = "p") -> Group:
    return Group(f"g{index}", prompt, ("good", "bad"), (Comparison(0, 1),), image, "e", "f", index + 1)


def encoded(*groups: Group, kept: tuple[int, ...] | None = None) -> EncodedSource:
    positions = tuple(range(len(groups))) if kept is None else kept
    return EncodedSource(MemorySource(groups), None, {}, positions, (), {})  # type: ignore[arg-type]


def evaluation(margins: list[float], tie: list[bool] | None = None) -> Evaluation:
    n = len(margins)
    values = np.asarray(margins, np.float32)
    return Evaluation(
        group=np.arange(n),
        winner=np.zeros(n, np.int32),
        loser=np.ones(n, np.int32),
        tie=np.zeros(n, bool) if tie is None else np.asarray(tie),
        margins={"primary": values, "proxy": -values},
        sfc=np.linspace(0, 1, n),
        mean_reward={"primary": 0.0, "proxy": 0.0},
    )


def test_results_come_in_one_order_and_shares_cover_them():
    config = MatrixConfig(objectives=("standard", "shortcut_aware", "text_only", "image_only"), seeds=2)
    cells = all_cells(config, ["b", "a"])
    runs = [(s, o, t) for s in (0, 1) for o in ("standard", "shortcut_aware", "image_only") for t in ("b", "a")]
    assert [(c.seed, c.objective, c.train) for c in cells] == runs
    for jobs in (1, 2, 3, 20):
        shares = share_out(cells, jobs)
        assert len(shares) == jobs and shares[0]
        assert sorted((c for share in shares for c in share), key=cells.index) == cells
        loads = [sum(forward_passes(c.objective) for c in share) for share in shares]
        assert max(loads) - min(loads) <= 2  # the cost of one cell
    assert share_out([], 2) == [[], []]
    # One objective after another, the costliest first, seed by seed; its steps are then compiled once.
    (share,) = share_out(cells, 1)
    order = [objective for objective, _ in itertools.groupby(share, key=lambda c: c.objective)]
    assert order == ["shortcut_aware", "standard", "image_only"] and [c.seed for c in share] == [0, 0, 1, 1] * 3
    assert [{c.objective for c in share} for share in share_out(cells, 2)] == [
        {"shortcut_aware"},
        {"image_only", "standard"},
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": 0}, "jobs is 0"),
        ({"seeds": -1}, "seeds is -1"),
        ({"objectives": ()}, "empty"),
        ({"objectives": ("standard", "standard")}, "names one twice"),
        ({"train": TrainConfig(objective="standard")}, "objective is not read"),
        ({"train": TrainConfig(eval_every=5)}, "eval_every is not read"),
    ],
)
def test_settings_that_make_no_matrix(settings, message):
    with pytest.raises(ValueError, match=message):
        MatrixConfig(**settings)


def test_unknown_objectives_and_shared_accelerators_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="'x' is not known; known: arm, caption_only"):
        check_matrix(MatrixConfig(objectives=("standard", "x")))
    with pytest.raises(ValueError, match="modifier 'x' is not known"):
        check_matrix(MatrixConfig(modifiers=("x",)))
    check_matrix(MatrixConfig(objectives=tuple(OBJECTIVES), jobs=2))
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="same gpu: use --jobs 1"):
        check_matrix(MatrixConfig(jobs=2))


def test_modifiers_are_trained_with_and_left_out_of_names():
    config = MatrixConfig(modifiers=("centring:weight=0.1", "margin"))
    cells = all_cells(config, ["a"])
    assert [cell.name for cell in cells] == ["standard-a-0", "shortcut_aware-a-0"]
    assert [cell_config(config, cell).objective for cell in cells] == [
        "standard+centring:weight=0.1+margin",
        "shortcut_aware+centring:weight=0.1+margin",
    ]
    both = modified(dataclasses.replace(config, objectives=("text_only", "shortcut_aware")))
    assert both.startswith(
        "Every objective is trained with centring:weight=0.1, margin; the text-only model is the proxy"
    )
    assert modified(MatrixConfig(modifiers=("margin:m=2",))) == "Every objective is trained with margin:m=2."


def test_a_cell_comes_back_as_it_was_written(tmp_path):
    cell, left_out = Cell("shortcut_aware", "a", 0), Quarantined("f", 3, "image: broken", "g3")
    with pytest.raises(CheckpointError, match="holds no finished run"):
        read_cell(tmp_path, cell)
    (tmp_path / "unreadable.jsonl").write_text(2 * (json.dumps(vars(left_out)) + "\n"))
    write_cell(tmp_path, CellResult(cell, {"t": evaluation([1.0, -1.0])}, [{"step": 1}], 2.5, [left_out]))
    result = read_cell(tmp_path, cell)
    assert (result.history, result.seconds, result.unreadable) == ([{"step": 1}], 2.5, [left_out])
    np.testing.assert_array_equal(result.evaluations["t"].margins["proxy"], [-1.0, 1.0])


def test_clusters_are_images_whatever_their_files_are_called(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"same")
    groups = [make_group(0, tmp_path / "a"), make_group(1, b"other"), make_group(2, tmp_path / "b")]
    groups += [make_group(3, None, "p"), make_group(4, None, "q"), make_group(5, None, "p"), make_group(6, b"other")]
    assert image_clusters(encoded(*groups)).tolist() == [0, 1, 0, 2, 3, 2, 1]
    assert image_clusters(encoded(*groups, kept=(2, 4, 6, 1))).tolist() == [0, 1, 2, 2]


def test_published_numbers_do_not_depend_on_what_else_was_run(tmp_path):
    groups = [make_group(i, bytes([i])) for i in range(12)]
    margins = np.random.default_rng(0).normal(0.3, 1, (2, 12))
    tie = [i == 11 for i in range(12)]  # the tie has the highest SFC, and is no example

    def results(objectives: tuple[str, ...]) -> tuple[list[dict], str]:
        out = tmp_path / "-".join(objectives)
        out.mkdir()
        found = [
            CellResult(
                Cell(o, "a", 0),
                {"ta": evaluation(margins[int(o == "standard")].tolist(), tie)},
                [{"step": 1}],
                3.0,
                [Quarantined("f", 9, "image: broken", "g")],
            )
            for o in objectives
        ]
        data = Data({"a": encoded(*groups)}, {"ta": encoded(*groups)}, {"a": "ta"}, None, [])  # type: ignore[arg-type]
        console = Console(quiet=True)
        result = publish(Matrix(MatrixConfig(objectives=objectives, out=out), data, found, 1.0), console, "mmrm")
        assert (result["training_seconds"], result["seconds"]) == (3.0 * len(objectives), 1.0)
        assert [entry["row"] for entry in result["unreadable"]] == [9]
        return result["rows"], (out / "report.html").read_text()

    both, page = results(("standard", "shortcut_aware"))
    swapped, _ = results(("shortcut_aware", "standard"))
    assert both == swapped[::-1]
    alone, _ = results(("shortcut_aware",))
    assert alone == [r for r in both if r["objective"] == "shortcut_aware"]
    assert "SFC <b>0.91</b>" in page and "SFC <b>1.00</b>" not in page


SHARES = [[Cell("standard", "a", 0)], [Cell("standard", "b", 0)]]


def test_other_processes_end_with_the_first(monkeypatch, tmp_path):
    config = MatrixConfig(jobs=2, out=tmp_path, train=TrainConfig(data=DataConfig(workers=0)))

    def fail(*args, after_cell) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "run_cells", fail)
    monkeypatch.setattr(matrix.ProcessPoolExecutor, "submit", _instead(matrix.ProcessPoolExecutor, time.sleep, 60))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        matrix.run_shares(config, None, None, SHARES, Console(quiet=True))  # type: ignore[arg-type]
    assert time.monotonic() - start < 20
    assert not multiprocessing.active_children()


def test_the_first_process_ends_with_another_that_fails(monkeypatch, tmp_path):
    config = MatrixConfig(jobs=2, out=tmp_path, train=TrainConfig(data=DataConfig(workers=0)))

    def cells_for_a_minute(*args, after_cell) -> None:
        for _ in range(600):
            time.sleep(0.1)
            after_cell()

    monkeypatch.setattr(matrix, "run_cells", cells_for_a_minute)
    monkeypatch.setattr(matrix.ProcessPoolExecutor, "submit", _instead(matrix.ProcessPoolExecutor, int, "no number"))
    start = time.monotonic()
    with pytest.raises(ValueError, match="no number"):
        matrix.run_shares(config, None, None, SHARES, Console(quiet=True))  # type: ignore[arg-type]
    assert time.monotonic() - start < 20


ORPHAN = """
import multiprocessing, os, time
from mmrm_jax.eval.matrix import end_with_parent

def work():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(60)
"""


def test_another_process_ends_with_the_first_that_is_killed(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        other = int(first.stdout.readline())
        os.kill(other, 0)  # it is there
        first.kill()
        start = time.monotonic()
        first.stdout.read()  # the pipe ends when the last process that could write to it has ended
    assert time.monotonic() - start < 20


def _instead(pool: type, function: Callable, argument: object) -> Callable:
    """A `submit` that calls `function(argument)`, whatever it is given."""
    submit = pool.submit
    return lambda self, *args: submit(self, function, argument)


def test_what_has_run_so_far_is_shown(capsys) -> None:
    found = {
        "a": evaluation([1, 1, -1, 5], [False, False, False, True]),
        "b": evaluation([-1, 1]),
        "n": evaluation([1]),
    }
    means = accuracies(found, "primary", "A", {"A": "a", "B": "b"})
    assert means == {"iid": pytest.approx(2 / 3), "ood": 0.5}
    lines = Running(Console())
    lines.add("standard", "standard-A-0", means)
    assert "standard-A-0: i.i.d. 66.7, o.o.d. 50.0" in capsys.readouterr().out
    live = Running(Console(force_terminal=True, width=100))
    with make_progress(live.console, TableProgress) as progress:
        progress.running = live
        live.add("standard", "standard-A-0", means)
        live.add("standard", "standard-B-0", {"iid": 1.0})
        progress.refresh()
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert re.search(r"standard +2 +83.3 +50.0", text), text
