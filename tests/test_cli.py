"""The command line: what it says about bad input, and one small run of every command."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from commands import FAST, run, write_pairs
from PIL import Image

from mmrm_jax import cli
from mmrm_jax.config import Environment, MatrixConfig, to_json
from mmrm_jax.eval.matrix import FREE
from mmrm_jax.eval.matrix_data import fingerprints, open_data, set_names
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.checkpoint import check_config, write_config


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
        (
            '{"prompt": "p", "img_path": "d.jsonl", "chosen": "a", "rejected": "b"}\n',
            "no comparisons: training and evaluation need rows with a preference; first reason: image",
        ),
    ],
)
def test_a_file_without_comparisons_is_a_clear_error(capsys, tmp_path, rows, reason):
    file = tmp_path / "d.jsonl"
    file.write_text(rows)
    out, known = tmp_path / "o", tmp_path / "o" / "quarantine.jsonl"
    status, text = run(capsys, "train", "--data", file, "--out", out, "--data.holdout", "0")
    assert status == 2 and reason in text and "d.jsonl" in text
    assert known.exists() == (f"all of them: {known}" in text) == bool(rows and "responses" not in rows)


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

    bad, before = tmp_path / "bad.jsonl", (out / "quarantine.jsonl").read_bytes()
    bad.write_text("{broken\n")
    for command, name in (
        (("evaluate", "--run", out, "--data", bad), "quarantine-bad.jsonl"),
        ((*train, "--data", bad), "quarantine-refused.jsonl"),  # the run keeps its own record
    ):
        status, text = run(capsys, *command)
        assert status == 2 and f"all of them: {out / name}" in text
        assert "broken JSON line" in (out / name).read_text()
        (out / name).unlink()
    assert (out / "quarantine.jsonl").read_bytes() == before

    prepare = ("prepare", file, "--out", tmp_path / "prepared", "--json", tmp_path / "prepare.json")
    status, text = run(capsys, *prepare)
    assert status == 0 and "24 groups, 24 comparisons, 0 quarantined" in text, text
    assert f"train on it: mmrm train --data {tmp_path / 'prepared'}:train --out runs/train" in text
    rows = []
    for data in (file, f"{tmp_path / 'prepared'}:train"):
        status, text = run(capsys, "evaluate", "--run", out, "--data", data, "--json", tmp_path / "eval.json")
        assert status == 0 and "n = 24" in text and "SFD" in text, text
        row = json.loads((tmp_path / "eval.json").read_text())["row"]
        assert sum(row["sfc_histogram"]["counts"]) == 24
        rows.append({k: v for k, v in row.items() if k != "test"})
    assert rows[0] == rows[1]
    assert {f.name for f in out.glob("quarantine-*.jsonl")} == {
        "quarantine-train.jsonl",
        "quarantine-prepared-train.jsonl",
    }


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
        (o, a, t) for o in ("text_only", "standard", "shortcut_aware") for a in "AB" for t in "AB"
    }
    assert [r["n"] for r in rows if r["test"] == "B"] == [16] * 6
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


def test_sets_go_by_their_environment_and_shared_ones_by_their_own_name():
    one, two = Environment("one", "a/train.jsonl", "t.jsonl"), Environment("two", "d:train", "t.jsonl")
    assert set_names([(e, str(e.train)) for e in (one, two)]) == {"a/train.jsonl": "one", "d:train": "two"}
    assert set_names([(e, e.test) for e in (one, two)]) == {"t.jsonl": "t"}
    assert set_names([(one, "d:train"), (two, "d:train")]) == {"d:train": "train"}
    with pytest.raises(ValueError, match="2 data sets would be called 'two': x/two.jsonl, d:train"):
        set_names([(one, "x/two.jsonl"), (Environment("three", None, ""), "x/two.jsonl"), (two, "d:train")])


def test_two_environments_of_one_name_are_refused(capsys):
    status, text = run(capsys, "matrix", "--env", "A=a.jsonl,ta.jsonl", "A=b.jsonl,tb.jsonl")
    assert status == 2 and "2 environments are called 'A'" in text


def test_what_a_command_does_not_read_is_refused(capsys, tmp_path):
    status, text = run(capsys, "quickstart", "--root", "x", "--out", tmp_path / "o")
    assert status == 2 and "renders its own data" in text
    status, text = run(capsys, "matrix", "--train.objective", "standard")
    assert status == 2 and "MatrixConfig.objectives says" in text
    status, text = run(capsys, "matrix", "--jobs", 0)
    assert status == 2 and "MatrixConfig.jobs is 0" in text
    status, text = run(capsys, "quickstart", "--objectives", "standrd", "--out", tmp_path / "o")
    assert status == 2 and "'standrd' is not known; known: standard" in text and not (tmp_path / "o").exists()


def test_changed_data_are_refused(capsys, tmp_path):
    file, out = write_pairs(tmp_path, "a", 4), tmp_path / "m"
    arguments = ["matrix", "--env", f"A={file},{file}", "--out", out, "--model", tmp_path / "model"]
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    config = MatrixConfig(model=tmp_path / "model", environments=(Environment("A", str(file), str(file)),), out=out)
    found = to_json(config) | {"fingerprints": fingerprints(open_data(config), tmp_path / "model")}
    write_config(out, found)
    check_config(out, found | {"title": "new", "seeds": 3}, ignore=FREE)
    write_pairs(tmp_path, "a", 4, seed=1)
    with (tmp_path / "model" / "model.safetensors").open("ab") as f:
        f.write(b" ")
    status, text = run(capsys, *arguments, "--title", "another", "--seeds", 2)
    differing = {line.split(":")[0].strip() for line in text.splitlines() if " -> " in line}
    assert status == 2 and differing == {f"fingerprints.{k}" for k in ("model", "test.A", "train.A")}, text


def test_an_interrupt_says_how_to_go_on_where_that_helps(capsys, monkeypatch):
    def interrupted(argv, console):
        raise KeyboardInterrupt

    for command in cli.COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, command, (interrupted, ""))
        status, text = run(capsys, command)
        assert status == 130 and ("give the same command again" in text) == (
            command in ("train", "matrix", "quickstart")
        )


def test_a_setting_out_of_range_is_named(capsys, tmp_path):
    status, text = run(capsys, "train", "--data", "d.jsonl", "--out", tmp_path / "o", "--log-every", 0)
    assert status == 2 and "TrainConfig.log_every is 0" in text


def test_a_command_that_never_began_does_not_hold_its_directory(capsys, tmp_path):
    file, out = write_pairs(tmp_path, "a", 2), tmp_path / "m"
    status, text = run(capsys, "matrix", "--env", f"A={file},{tmp_path / 'typo.jsonl'}", "--out", out)
    assert status == 2 and "typo.jsonl" in text and not out.exists()


def test_the_systems_own_errors_are_plain(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    file = write_pairs(tmp_path, "a", 2)
    status, text = run(capsys, "prepare", file, "--out", tmp_path / "o", "--json", tmp_path / "file" / "x.json")
    assert status == 2 and f"{tmp_path / 'file'}: File exists" in text and "Errno" not in text
    (tmp_path / "model" / "config.json").mkdir(parents=True)
    for command in (
        ("inspect", tmp_path / "model"),
        ("train", "--data", file, "--out", tmp_path / "o", "--model", tmp_path / "model"),
    ):
        status, text = run(capsys, *command)
        assert status == 2 and "config.json cannot be read" in text and "Errno" not in text


def test_a_matrix_directory_is_no_run_to_evaluate(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model": null}')
    status, text = run(capsys, "evaluate", "--run", tmp_path, "--data", "d.jsonl")
    assert status == 2 and "no run of `mmrm train`" in text
