"""The command line: what it says about bad input, and one small run of every command."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrm_jax import cli

FAST = ["--train.batch-size", "8", "--train.log-every", "1", "--train.eval-batch-size", "8"]


def run(capsys, *arguments: object) -> tuple[int, str]:
    """Exit status and everything printed."""
    argv, sys.argv = sys.argv, ["mmrm", *map(str, arguments)]
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def write_pairs(folder: Path, name: str, count: int, *, seed: int = 0) -> Path:
    """A preference file whose chosen answer names the picture's colour."""
    rng = np.random.default_rng(seed)
    colours = {"red": (220, 30, 30), "blue": (30, 60, 220)}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        names = list(colours) if rng.random() < 0.5 else list(colours)[::-1]
        pixels = np.clip(np.asarray(colours[names[0]]) + rng.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        image = f"images/{name}-{i}.png"
        Image.fromarray(pixels).save(folder / image)
        chosen, rejected = (f"It is {n}." for n in names)
        rows.append({"id": f"{i}", "prompt": "Colour?", "img_path": image, "chosen": chosen, "rejected": rejected})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_help_and_unknown_commands(capsys):
    status, text = run(capsys, "--help")
    assert status == 0 and all(name in text for name in cli.COMMANDS)
    status, text = run(capsys, "matrx")
    assert status == 2 and "did you mean 'matrix'" in text


def test_an_unknown_option_suggests_the_nearest(capsys):
    status, text = run(capsys, "matrix", "--train.batchsize", "3")
    assert status == 2 and "--train.batch-size" in text


def test_an_unknown_configuration_key_suggests_the_nearest(capsys, tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from mmrm_jax.config import MatrixConfig, TrainConfig\nconfig = TrainConfig(batchsize=3)\n")
    status, text = run(capsys, "matrix", file)
    assert status == 2 and str(file) in text and "did you mean 'batch_size'" in text


def test_a_configuration_of_the_wrong_kind_or_missing_is_named(capsys, tmp_path):
    file = tmp_path / "c.py"
    file.write_text("config = 3\n")
    status, text = run(capsys, "matrix", file)
    assert status == 2 and "must define `config`, a MatrixConfig; it is int" in text
    status, text = run(capsys, "matrix", tmp_path / "none.py")
    assert status == 2 and "does not exist" in text


def test_a_matrix_without_environments_says_what_to_do(capsys):
    status, text = run(capsys, "matrix")
    assert status == 2 and "--env" in text and "configs/grocery.py" in text


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("", "holds no rows"),
        ("{broken\n", "no usable row"),
        ('{"prompt": "p", "img_path": null, "responses": ["a", "b"]}\n', "no comparisons"),
    ],
)
def test_a_file_without_comparisons_is_a_clear_error(capsys, tmp_path, rows, reason):
    file = tmp_path / "d.jsonl"
    file.write_text(rows)
    status, text = run(capsys, "train", "--data", file, "--out", tmp_path / "o", "--data.holdout", "0")
    assert status == 2 and reason in text and "d.jsonl" in text


def test_a_missing_model_folder_is_named(capsys, tmp_path):
    file = write_pairs(tmp_path, "a", 2)
    status, text = run(capsys, "train", "--data", file, "--out", tmp_path / "o", "--model", tmp_path / "nowhere")
    assert status == 2 and "nowhere" in text and "config.json" in text


def test_train_resume_evaluate_and_prepare(capsys, tmp_path):
    file = write_pairs(tmp_path, "train", 24)
    out, options = tmp_path / "run", ["--batch-size", 8, "--log-every", 1, "--eval-batch-size", 8]
    train = ["train", "--data", file, "--out", out, "--steps", 3, *options]
    status, text = run(capsys, *train, "--json", tmp_path / "train.json")
    assert status == 0 and "score" in text, text
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["steps"] == 3 and 0 <= result["final"]["validation/accuracy"] <= 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3

    status, text = run(capsys, *train)
    assert status == 0 and "going on from step 3" in text, text
    status, text = run(capsys, *train, "--seed", 5)
    assert status == 2 and "seed: 0 -> 5" in text

    status, text = run(capsys, "prepare", file, "--out", tmp_path / "prepared", "--json", tmp_path / "prepare.json")
    assert status == 0 and "24 groups, 24 comparisons, 0 quarantined" in text, text
    rows = []
    for data in (file, f"{tmp_path / 'prepared'}:train"):
        status, text = run(capsys, "evaluate", "--run", out, "--data", data, "--json", tmp_path / "eval.json")
        assert status == 0 and "n = 24" in text and "SFD" in text, text
        row = json.loads((tmp_path / "eval.json").read_text())["row"]
        assert sum(row["sfc_histogram"]["counts"]) == 24
        rows.append({k: v for k, v in row.items() if k != "test"})
    assert rows[0] == rows[1]


def test_matrix_on_files_with_bad_rows_and_resume(capsys, tmp_path):
    files = {name: write_pairs(tmp_path, name, 16, seed=i) for i, name in enumerate(["a", "b", "ta", "tb"])}
    with files["a"].open("a") as f:
        f.write('{"id": "x", "prompt": "p", "img_path": "images/none.png", "chosen": "a", "rejected": "b"}\n')
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "JPEG")
    (tmp_path / "images/cut.jpg").write_bytes(buffer.getvalue()[:-300])
    with files["tb"].open("a") as f:
        f.write('{"id": "y", "prompt": "p", "img_path": "images/cut.jpg", "chosen": "a", "rejected": "b"}\n')
    out, result = tmp_path / "m", tmp_path / "m.json"
    arguments = ["matrix", "--root", tmp_path, "--env", "A=a.jsonl,ta.jsonl", "B=b.jsonl,tb.jsonl", "--out", out]
    arguments += ["--train.steps", 2, "--json", result, *FAST]
    status, text = run(capsys, *arguments)
    assert status == 0 and "2 quarantined" in text, text
    rows = json.loads(result.read_text())["rows"]
    assert {(r["objective"], r["train"], r["test"]) for r in rows} == {
        (o, a, t) for o in ("text_only", "standard", "shortcut_aware") for a in "ab" for t in ("ta", "tb")
    }
    assert [r["n"] for r in rows if r["test"] == "tb"] == [16] * 6
    reasons = [json.loads(line)["reason"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert any("none.png" in r for r in reasons) and any("cannot be decoded" in r for r in reasons)
    assert "<script" not in (out / "report.html").read_text()

    finished = {p: p.stat().st_mtime_ns for p in out.rglob("cell.json")}
    assert len(finished) == 4
    status, text = run(capsys, *arguments)
    assert status == 0 and {p: p.stat().st_mtime_ns for p in finished} == finished
    assert json.loads(result.read_text())["rows"] == rows
    status, text = run(capsys, *arguments, "--train.optimizer.learning-rate", "0.5")
    assert status == 2 and "learning_rate" in text
