"""Scoring that is interrupted, shared out, or written as Parquet gives what it would have given in one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import run, write_pairs, xla_flags
from test_processes import Two

from mmrm_jax.eval import score
from mmrm_jax.eval.score_parts import Parts
from mmrm_jax.tiny import MODEL_DIR

SMALL = "import mmrm_jax.eval.score as s; s.BATCHES = 1; from mmrm_jax.cli import main; main()"
# Rests after every part, so that it can be killed between the first and the last however busy the machine is.
SLOW = "import time, mmrm_jax.eval.score_parts as p; w = p.Parts.write; "
SLOW += "p.Parts.write = lambda self, k, rows: (w(self, k, rows), time.sleep(0.5)); " + SMALL


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """60 rows of one to three responses, some of which cannot be scored; one holds half of a surrogate pair."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in write_pairs(folder, "a", 60).read_text().splitlines()]
    lines = []
    for i, row in enumerate(rows):
        responses = [row["chosen"], row["rejected"], "It is green, as one can see in the picture."][: 1 + i % 3]
        asked = {"id": row["id"], "prompt": row["prompt"], "img_path": row["img_path"], "responses": responses}
        if i % 17 == 5:
            asked["img_path"] = "images/none.png"
        if i % 19 == 3:
            asked["responses"] = [*responses, " "]
        if i == 7:
            asked["history"] = ["What is it?", "A square."]
        lines.append("{cut" if i == 33 else json.dumps(asked))
    lines.append(json.dumps({"prompt": "half \ud800", "img_path": None, "responses": ["a"]}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def arguments(data: Path, out: Path, *more: object) -> list[object]:
    return ["score", "--model", MODEL_DIR, "--draw-score", 3, "--data", data, "--out", out, "--batch-size", 8, *more]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(score, "BATCHES", 1)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory) -> Path:
    """All of it scored in one go, by one process of one device."""
    out = tmp_path_factory.mktemp("whole") / "scores.jsonl"
    start(arguments(data, out)).communicate()
    return out


def start(command: list[object], program: str = SMALL) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, command)], env=environment)


def test_killed_and_given_again_it_writes_the_same_bytes(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    parts = Parts(tmp_path / "scores.jsonl.parts")
    process = start(arguments(data, out), SLOW)
    deadline = time.monotonic() + 120
    while not parts.done(0) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert parts.done(0) and not parts.done(7) and not out.exists()
    (parts.folder / "000007.jsonl").write_text('{"id": "of a part that was not fini')
    assert start(arguments(data, out)).wait() == 0
    assert out.read_bytes() == whole.read_bytes() and sorted(tmp_path.iterdir()) == [out]


def test_what_is_finished_is_not_scored_again(capsys, monkeypatch, data: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    written: list[int] = []
    write = Parts.write

    def stop_at_three(self: Parts, k: int, rows) -> None:
        if len(written) == 3:
            raise RuntimeError("stopped")
        written.append(k)
        write(self, k, rows)

    assert run(capsys, *arguments(data, out))[0] == 0
    monkeypatch.setattr(Parts, "write", stop_at_three)
    status, text = run(capsys, *arguments(data, again))
    assert status == 2 and "stopped" in text and written == [0, 1, 2]
    # Other settings would give other bytes.
    for more, change in (
        (("--dtype", "bfloat16"), "dtype: 'float32' -> 'bfloat16'"),
        (("--buckets", 2), "buckets: 4 -> 2"),
    ):
        status, text = run(capsys, *arguments(data, again, *more))
        assert status == 2 and change in text, text
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text().replace("Colour?", "Which colour?", 1))
    status, text = run(capsys, *arguments(other, again))
    assert status == 2 and "data" in text and "another configuration" in text
    written.clear()
    monkeypatch.setattr(Parts, "write", lambda self, k, rows: (written.append(k), write(self, k, rows)))
    status, text = run(capsys, *arguments(data, again))
    assert status == 0 and "going on: 3 of 8 parts" in text and written == [3, 4, 5, 6, 7], text
    assert again.read_bytes() == out.read_bytes()


def test_two_processes_share_the_parts(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    two = Two(tmp_path, *arguments(data, out), program=SMALL)
    assert two.wait() == [0, 0], [log.read_text() for log in two.logs]
    got, want = ([json.loads(line) for line in file.read_text().splitlines()] for file in (out, whole))
    scores = [[line.pop("score", None) for line in lines] for lines in (got, want)]
    assert got == want and scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_parquet_holds_the_same(capsys, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    assert run(capsys, *arguments(data, out))[0] == 0
    found = pq.read_table(out).to_pylist()
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert len(found) == len(lines) and sum("history" in line for line in lines) == 2
    for row, line in zip(found, lines, strict=True):
        assert row["score"] == (pytest.approx(line["score"], abs=1e-5) if "score" in line else None)
        known = {k: v for k, v in line.items() if k != "score"} | {"prompt": line.get("prompt")}
        if "history" in line:
            known["history"] = json.dumps(line["history"])
        if line.get("prompt") == "half \ud800":
            known["prompt"] = "half \\ud800"
        assert {k: v for k, v in row.items() if v is not None and k != "score"} == {
            k: v for k, v in known.items() if v is not None
        }
