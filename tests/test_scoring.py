"""Rows to score: a line for every response, and what is known of those that cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmrm_jax.data.records import DataError
from mmrm_jax.data.scoring import ScoringRow, read_scoring, row_of_group
from mmrm_jax.types import Group

pytestmark = pytest.mark.usefixtures("one_device")

PAIR = {"id": "a", "prompt": "p", "img_path": "i.png", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def read(tmp_path):
    """Read rows (objects, or raw lines) from a file f.jsonl beside an existing image i.png."""
    (tmp_path / "i.png").write_bytes(b"image")

    def read_rows(*rows) -> list[ScoringRow]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "f.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return read_scoring(tmp_path / "f.jsonl", None)

    return read_rows


def completed(*rated):
    rows = [{"response": response, "annotations": {"A": {"Rating": rating}}} for response, rating in rated]
    return {"id": "v", "prompt": "p", "image": "./i.png", "completions": rows}


def test_every_response_is_read_whatever_is_compared(read):
    rows = read(
        completed(("same", "5"), ("same", "4"), ("unrated", "N/A"), ("tied", "4")),
        {**PAIR, "chosen": "x", "rejected": "x", "margin": "no number"},
        {"prompt": "p", "img_path": None, "responses": ["x", "x"]},
    )
    assert [row.group.responses for row in rows] == [("same", "same", "unrated", "tied"), ("x", "x"), ("x", "x")]
    assert not any(row.group.comparisons for row in rows)
    assert rows[0].lines[3] == {"id": "v", "prompt": "p", "img_path": "./i.png", "response": "tied"}
    assert rows[2].lines[0] == {"id": "f-3", "prompt": "p", "img_path": None, "response": "x"}


def test_an_error_stands_in_the_place_of_its_response(read):
    (row, pair) = read(
        completed((" ", "1"), ("good", "2"), (None, "3")), {**PAIR, "img_path": "no.png", "rejected": ""}
    )
    assert row.group.responses == ("good",)
    assert [line["response"] for line in row.lines] == [" ", "good", None]
    empty, fine, null = (line.get("error") for line in row.lines)
    assert fine is None and "empty response: 'completions[0].response'" in empty and "is a null" in null
    assert pair.group is None and [line["response"] for line in pair.lines] == ["good", ""]
    assert "no.png, which does not exist" in pair.lines[0]["error"] and "empty response" in pair.lines[1]["error"]
    assert all((line["id"], line["prompt"], line["img_path"]) == ("a", "p", "no.png") for line in pair.lines)


@pytest.mark.parametrize(
    ("row", "known", "reason"),
    [
        ("{cut", {}, "broken JSON line"),
        ("[1]", {}, "the row is a JSON list; it must be one object"),
        ({"id": 3, "prompt": "p", "img_path": None}, {"id": "3", "prompt": "p", "img_path": None}, "unknown format"),
        (
            {"prompt": "p", "img_path": "i.png", "responses": []},
            {"id": "f-2", "prompt": "p", "img_path": "i.png"},
            "list",
        ),
        ({"img_path": 4, "completions": []}, {"id": "f-2"}, "no responses"),
    ],
)
def test_a_row_whose_responses_cannot_be_told_has_one_line(read, tmp_path, row, known, reason):
    (_, found) = read(PAIR, row)
    (line,) = found.lines
    assert found.group is None and reason in line.pop("error")
    assert line == known | {"file": str(tmp_path / "f.jsonl"), "row": 2}


def test_what_is_no_text_is_left_out_of_the_line(read):
    """NaN, which a row may hold, is no JSON."""
    (row,) = read('{"prompt": NaN, "img_path": {"a": 1}, "responses": [NaN, "a"]}')
    assert [set(line) for line in row.lines] == [{"id", "error"}, {"id", "response", "error"}]


def test_a_file_without_rows_is_refused(read):
    with pytest.raises(DataError, match="holds no rows"):
        read("", " ")


def test_the_lines_of_a_group_are_its_responses():
    group = Group("a", "p", ("x", "y"), (), Path("i.png"), "e", "f.jsonl", 4, "i.png")
    place = {"id": "a", "prompt": "p", "img_path": "i.png"}
    assert row_of_group(group) == ScoringRow(
        "f.jsonl", 4, (place | {"response": "x"}, place | {"response": "y"}), group
    )
