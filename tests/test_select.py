"""`mmrm best-of-n`: picks in order, curves with gold scores from a field or a file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run

from mmrm_jax.eval.best_of import expected_best

pytestmark = pytest.mark.usefixtures("one_device")


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scored(folder: Path) -> tuple[Path, list[dict]]:
    """Three prompts with 3, 2 and 4 responses; one that could not be scored, a tie, and halves of a surrogate pair."""
    scores = [[0.5, 2.0, -1.0], [1.0, 1.0], [0.0, 3.0, 4.0, 1.5]]
    lines = [
        {"id": f"{p}", "prompt": "Same?", "img_path": "a.png", "response": f"{p}{i}\ud800", "score": s, "human": -s}
        for p, values in enumerate(scores)
        for i, s in enumerate(values)
    ]
    return write(folder / "scores.jsonl", [*lines[:2], {"error": "no image"}, *lines[2:]]), lines


def test_one_prompt_has_a_curve_without_intervals(capsys, tmp_path: Path) -> None:
    _, lines = scored(tmp_path)
    file = write(tmp_path / "one.jsonl", lines[:3])
    status, text = run(capsys, "best-of-n", file, "--out", tmp_path / "best.jsonl", "--plot", tmp_path / "curve.png")
    assert status == 0 and "0.500" in text and " to " not in text.split("best of n:")[1].split("\n", 1)[1], text
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_picks_and_curves(capsys, tmp_path: Path) -> None:
    file, lines = scored(tmp_path)
    command = ["best-of-n", file, "--out", tmp_path / "best.jsonl", "--json", tmp_path / "r.json"]
    status, text = run(capsys, *command, "--top", 2, "--gold", "human", "--plot", tmp_path / "curve.png")
    assert status == 0 and "left out: 1 lines" in text and "n ends at 2" in text, text
    picks = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [(p["response"][:2], p["rank"], p["of"]) for p in picks] == [
        *(("01", 1, 3), ("00", 2, 3), ("10", 1, 2), ("11", 2, 2), ("22", 1, 4), ("21", 2, 4))
    ]
    assert all(p["gold"] == p["human"] == -p["score"] for p in picks)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["prompts"], result["responses"], result["unscored"], result["ns"]) == (3, 9, 1, [1, 2])
    by_prompt = [np.asarray([x["score"] for x in lines if x["id"] == p]) for p in "012"]
    expected = np.mean([expected_best(s, s, [1, 2]) for s in by_prompt], axis=0)
    np.testing.assert_allclose([point["mean"] for point in result["curves"]["score"]], expected)
    expected = np.mean([expected_best(s, -s, [1, 2]) for s in by_prompt], axis=0)
    np.testing.assert_allclose([point["mean"] for point in result["curves"]["gold"]], expected)

    # The same from another file of scores.
    other = write(tmp_path / "better.jsonl", [*lines[:2], {"error": "x"}, *lines[2:]])
    other.write_text(other.read_text().replace('"score": ', '"score": -').replace("--", ""))
    again = tmp_path / "again.json"
    status, text = run(capsys, *command[:-1], again, "--gold-scores", other)
    assert status == 0 and json.loads(again.read_text())["curves"] == result["curves"], text


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"score": "high"}, [], "row 1: 'score' is 'high'; it must be a finite number"),
        ({"score": True}, [], "row 1: 'score' is True"),
        ({"human": None}, ["--gold", "human"], "row 1: 'human' is None"),
        ({}, ["--gold", "checker"], "row 1: there is no 'checker', only id, prompt"),
        ({}, ["--top", 0], "--top is 0; it must be at least 1"),
        ({}, ["--gold", "human", "--gold-scores", "x.jsonl"], "give one of them"),
        ({"response": "another"}, ["--gold-scores", "scores.jsonl"], "row 1 is not about the response of"),
    ],
)
def test_what_cannot_be_used_is_named(capsys, monkeypatch, tmp_path: Path, change: dict, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    _, lines = scored(tmp_path)
    file = write(tmp_path / "changed.jsonl", [lines[0] | change, *lines[1:]])
    status, text = run(capsys, "best-of-n", file, "--out", "best.jsonl", *options)
    assert status == 2 and message in text.replace("\n", " "), text


@pytest.mark.parametrize("option", ["--out", "--plot"])
@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to])
def test_files_that_are_read_are_not_overwritten(capsys, tmp_path: Path, option: str, link) -> None:
    file, _ = scored(tmp_path)
    gold = tmp_path / "gold.jsonl"
    gold.write_bytes(file.read_bytes())
    before = file.read_bytes()
    command = ["best-of-n", file, "--gold-scores", gold, "--out", tmp_path / "best.jsonl"]
    for read in (file, gold):
        same = read.parent / "." / read.name
        if link is not None:
            same = tmp_path / f"link-to-{read.name}"
            link(same, read)
        status, text = run(capsys, *command, option, same)
        assert status == 2 and f"{option} {same} would overwrite {read}" in text.replace("\n", " "), text
        assert file.read_bytes() == gold.read_bytes() == before and not (tmp_path / "best.jsonl").exists()
    status, text = run(capsys, *command, "--plot", tmp_path / "best.jsonl")
    assert status == 2 and "--plot" in text and not (tmp_path / "best.jsonl").exists(), text


def test_columns_of_parquet_are_null_where_a_line_lacks_them(capsys, tmp_path: Path) -> None:
    file, lines = scored(tmp_path)
    columns: list[dict] = [line | {"response": f"{i}", "error": None} for i, line in enumerate(lines)]
    columns.insert(3, {"id": "1", "score": None, "error": "the image cannot be read"})
    (tmp_path / "[").mkdir()
    same = tmp_path / "[" / "b].parquet"  # [/b] ends nothing
    pq.write_table(pa.Table.from_pylist(columns), same)
    found = []
    for each in (file, same):
        command = ["best-of-n", each, "--out", f"{each}.best", "--gold", "human", "--json", tmp_path / "r.json"]
        status, text = run(capsys, *command)
        assert status == 0 and "left out: 1 lines" in text, text
        found.append(json.loads((tmp_path / "r.json").read_text()) | {"out": ""})
    assert found[0] == found[1]
    pq.write_table(pa.Table.from_pylist([*columns, columns[3] | {"error": None}]), same)
    status, text = run(capsys, "best-of-n", same, "--out", tmp_path / "best.jsonl")
    assert status == 2 and "row 11: 'score' is None; it must be a finite number" in text.replace("\n", " "), text


def test_files_without_scores_are_refused(capsys, tmp_path: Path) -> None:
    for lines, message in (([{"error": "x"}], "no line with a score"), ([3], "row 1: it is no JSON object")):
        file = write(tmp_path / "none.jsonl", lines)  # type: ignore[arg-type]
        status, text = run(capsys, "best-of-n", file, "--out", tmp_path / "best.jsonl")
        assert status == 2 and message in text, text
