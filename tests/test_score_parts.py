"""Scoring that is interrupted, shared out, or written as Parquet gives what it would have given in one go."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import run, write_pairs, xla_flags
from rich.console import Console
from test_processes import Two

from mmrm_jax import files
from mmrm_jax.eval import score
from mmrm_jax.eval.score_parts import Parts
from mmrm_jax.files import InUse
from mmrm_jax.tiny import MODEL_DIR

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = "import mmrm_jax.eval.score as s; s.BATCHES = 1; from mmrm_jax.cli import main; main()"
# Rests after every part, so that it can be killed between the first and the last however busy the machine is.
SLOW = "import time, mmrm_jax.eval.score_parts as p; w = p.Parts.write; "
SLOW += "p.Parts.write = lambda self, k, rows: (w(self, k, rows), time.sleep(0.5)); " + SMALL
# Is killed while it deletes its parts: config.json is gone, some of the others are not.
STOPS = """
import os, signal
unlink = os.unlink
def stop(path, *rest, **named):
    unlink(path, *rest, **named)
    if os.path.basename(path) == "config.json": os.kill(os.getpid(), signal.SIGKILL)
os.unlink = stop
"""


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


def test_parts_left_by_a_kill_are_those_of_no_other_model(capsys, data: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "scores.jsonl", tmp_path / "fresh.jsonl"
    assert start(arguments(data, out), STOPS + SMALL).wait() == -signal.SIGKILL
    assert out.exists() and not (tmp_path / "scores.jsonl.parts").exists()
    left = tmp_path / "scores.jsonl.parts-ended"
    assert left.exists() and not (left / "config.json").exists()
    other = ["--draw-score", 4]
    assert run(capsys, *arguments(data, fresh), *other)[0] == 0
    status, text = run(capsys, *arguments(data, out), *other)
    assert status == 0 and "going on" not in text, text
    assert out.read_bytes() == fresh.read_bytes() and sorted(tmp_path.iterdir()) == [fresh, out]


def test_a_part_needs_both_of_its_files_and_a_configuration(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    with Parts.begin(out, {"model": "a"}) as parts:
        for k in range(3):
            parts.write(k, [])
        (parts.folder / "000001.jsonl").unlink()
        assert [parts.done(k) for k in range(4)] == [True, False, True, False]
    with Parts.begin(out, {"model": "a"}) as parts:
        assert parts.done(0)
    (parts.folder / "config.json").unlink()
    (parts.folder / "notes").write_text("not of a part")
    with Parts.begin(out, {"model": "b"}) as parts:
        assert sorted(file.name for file in parts.folder.iterdir()) == ["config.json", "lock", "notes"]


def test_a_second_command_with_the_same_out_is_refused(capsys, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    with Parts.begin(out, {"of": "another command"}) as parts:
        before = sorted(parts.folder.iterdir())
        status, text = run(capsys, *arguments(data, out))
        assert status == 2 and "parts is in use: another command is writing" in text.replace("\n", " "), text
        two = Two(tmp_path, *arguments(data, out), program=SMALL)
        assert two.wait() == [2, 2] and "is in use" in two.said(), two.said()
        assert sorted(parts.folder.iterdir()) == before and not out.exists()
    # Killed, or ended by an error, it holds nothing any more.
    with pytest.raises(RuntimeError, match="stopped"), Parts.begin(out, {"of": "another command"}):
        raise RuntimeError("stopped")
    shutil.rmtree(parts.folder)
    assert run(capsys, *arguments(data, out))[0] == 0 and out.exists() and not parts.folder.exists()


def test_a_lock_whose_folder_has_gone_is_taken_anew(monkeypatch, tmp_path: Path) -> None:
    """The other command ends between the opening of its lock and the locking of it."""
    out, flock, folders = tmp_path / "scores.jsonl", files.fcntl.flock, []

    def late(file, how: int) -> None:
        if not folders:
            folders.append((tmp_path / "scores.jsonl.parts").rename(tmp_path / "ended"))
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with Parts.begin(out, {}) as parts:
        assert folders and sorted(file.name for file in parts.folder.iterdir()) == ["config.json", "lock"]
        with pytest.raises(InUse, match="is in use"), Parts.begin(out, {}):
            raise AssertionError("two have it")


def test_a_file_system_without_locks_is_written_to(monkeypatch, tmp_path: Path) -> None:
    def refuse(error: int) -> None:
        def flock(*_) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(files.fcntl, "flock", flock)

    refuse(errno.ENOSYS)
    with Parts.begin(tmp_path / "scores.jsonl", {}) as parts:
        assert parts.folder.is_dir()
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), Parts.begin(tmp_path / "scores.jsonl", {}):
        pass


def test_names_are_no_markup(capsys, monkeypatch, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "["
    folder.mkdir()
    shutil.copytree(data.parent / "images", folder / "images")
    file, out = folder / "b].jsonl", folder / "b] scores.jsonl"
    file.write_text("".join(data.read_text().splitlines(keepends=True)[:20]))
    write = Parts.write
    monkeypatch.setattr(Parts, "write", lambda self, k, rows: write(self, k, rows) if k == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, *arguments(file, out))
    monkeypatch.setattr(Parts, "write", write)
    for _ in range(2):
        status, text = run(capsys, *arguments(file, out))
        assert status == 0 and "without a score" in text and "[/b] scores.jsonl" in text.replace("\n", ""), text
    console = Console(file=io.StringIO(), force_terminal=True)
    assert list(score._bar("reading [/b]", console)(range(3))) == [0, 1, 2]


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
    found = []
    for file in (out, whole):
        summary = tmp_path / "summary.json"
        status, text = run(capsys, "best-of-n", file, "--out", tmp_path / "best.jsonl", "--json", summary)
        assert status == 0, text
        found.append(json.loads(summary.read_text()))
    assert found[0]["unscored"] == found[1]["unscored"] > 0
    assert all(found[0][name] == found[1][name] for name in ("prompts", "responses", "ns"))
