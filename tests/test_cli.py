"""The command line: what it says about bad input, and one small run of every command."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import FAST, run, write_pairs
from PIL import Image

import mmrm_jax
from mmrm_jax import cli
from mmrm_jax.config import Environment, MatrixConfig, to_json
from mmrm_jax.eval import single
from mmrm_jax.eval.matrix import FREE
from mmrm_jax.eval.matrix_data import fingerprints, open_data, set_names
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.checkpoint import check_config, write_config

pytestmark = pytest.mark.usefixtures("one_device")


def test_help_and_unknown_commands(capsys):
    status, text = run(capsys, "--help")
    assert status == 0 and all(name in text for name in cli.COMMANDS)
    status, text = run(capsys, "--version")
    assert status == 0 and text == f"mmrm {mmrm_jax.__version__}\n"
    status, text = run(capsys, "matrx")
    assert status == 2 and "did you mean 'matrix'" in text


def test_help_lists_what_is_read_and_explains_it(capsys):
    for command, hidden in (
        ("matrix", ("objective", "eval-every")),
        ("quickstart", ("objective", "eval-every", "steps")),
    ):
        status, text = run(capsys, command, "--help")
        assert status == 0 and not [name for name in hidden if f"--train.{name} " in text]
        assert "--train.batch-size INT" in text and "Decay of the mean of gradients" in text
    assert "(default: 500)" in text and "Settings of every run" in text


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
    assert status == 2 and "must define `config` of MatrixConfig; it is int" in text
    file.write_text("from mmrm_jax.config import AblateConfig\nconfig = AblateConfig()\n")
    status, text = run(capsys, "matrix", file)
    assert status == 2 and "it is AblateConfig: for mmrm ablate" in text
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
            "no comparisons: training and evaluation need rows with a preference; first reason: unusable image: image",
        ),
    ],
)
def test_a_file_without_comparisons_is_a_clear_error(capsys, tmp_path, rows, reason):
    file = tmp_path / "d.jsonl"
    file.write_text(rows)
    out, known = tmp_path / "o", tmp_path / "o" / "quarantine.jsonl"
    status, text = run(capsys, "train", "--data", file, "--out", out, "--data.holdout", "0")
    assert status == 2 and reason in text and "d.jsonl" in text
    assert known.exists() == (f"all of them: {known}" in text) == bool(rows)


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
    held_out = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["validation/n"]
    text = " ".join(text.split())
    assert "24 groups in 2 sets; batches are padded to one size, and each step is compiled once; " in text
    assert f"held out, n = {held_out}" in text and "training, last 1 steps" in text, text
    assert all(f"shortcut_aware {step}/3 loss " in text for step in (1, 2, 3)), "a log has a line for every report"
    assert f"test it: mmrm evaluate --run {out} --data FILE" in text
    assert "accuracy of the text-only proxy" in text and "/accuracy" not in text
    assert "a learning rate of 1e-05 hardly trains the tiny model" in text and "--optimizer.learning-rate 0.001" in text
    result = json.loads((tmp_path / "train.json").read_text())
    assert held_out > 0 and f"validation {100 * result['final']['validation/accuracy']:.1f} % (n = {held_out})" in text
    assert result["steps"] == 3 and 0 <= result["final"]["validation/accuracy"] <= 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3

    status, text = run(capsys, *train)
    assert status == 0 and "finished before, at step 3" in text, text
    status, text = run(capsys, *train, "--seed", 5)
    assert status == 2 and "seed: 0 -> 5" in text
    status, text = run(capsys, *train, "--resume")
    assert status == 0 and "finished before, at step 3" in text, text
    status, text = run(capsys, *train, "--no-resume", "--log-every", 3)
    assert status == 0 and "finished before" not in text and "going on" not in text, text
    again = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in again] == [3]
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["3"]

    bad, before = tmp_path / "bad.jsonl", (out / "quarantine.jsonl").read_bytes()
    bad.write_text("{broken\n")
    for command, name in (
        (("evaluate", "--run", out, "--data", bad), single.quarantine_name(str(bad))),
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
        single.quarantine_name(str(data)) for data in (file, f"{tmp_path / 'prepared'}:train")
    }
    assert single.quarantine_name("a/test.jsonl") != single.quarantine_name("b/test.jsonl")


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
    assert status == 2 and "learning_rate" in text and "hardly trains" not in text

    # Every cell is a run: what the matrix measured is what `mmrm evaluate` measures, and it can be exported.
    cell, found = out / "cells" / "shortcut_aware-A-0", tmp_path / "evaluated.json"
    status, text = run(capsys, "evaluate", "--run", cell, "--data", files["ta"], "--json", found)
    assert status == 0, text
    (row,) = (r for r in rows if (r["objective"], r["train"], r["test"]) == ("shortcut_aware", "A", "A"))
    evaluated = json.loads(found.read_text())
    assert evaluated["finished"] and evaluated["row"]["n"] == 16
    for name in ("accuracy", "mean_margin", "mean_reward", "sfc_mean"):
        assert evaluated["row"][name] == pytest.approx(row[name], abs=1e-5), name
    status, text = run(capsys, "export", "--run", cell, "--out", tmp_path / "exported")
    assert status == 0 and (tmp_path / "exported" / "model.safetensors").exists(), text
    status, text = run(capsys, "evaluate", "--run", out, "--data", files["ta"])
    assert status == 2 and f"{out} holds a matrix of 4 runs; name one: {out / 'cells'}" in text.replace("\n", ""), text


def test_sets_go_by_their_environment_and_shared_ones_by_their_own_name():
    one, two = Environment("one", "a/train.jsonl", "t.jsonl"), Environment("two", "d:train", "t.jsonl")
    assert set_names([(e, str(e.train)) for e in (one, two)]) == {"a/train.jsonl": "one", "d:train": "two"}
    assert set_names([(e, e.test) for e in (one, two)]) == {"t.jsonl": "t"}
    assert set_names([(one, "d:train"), (two, "d:train")]) == {"d:train": "train"}
    with pytest.raises(ValueError, match="2 data sets would be called 'two': x/two.jsonl, d:train"):
        set_names([(one, "x/two.jsonl"), (Environment("three", None, ""), "x/two.jsonl"), (two, "d:train")])


def test_two_environments_of_one_name_and_names_that_are_paths_are_refused(capsys):
    status, text = run(capsys, "matrix", "--env", "A=a.jsonl,ta.jsonl", "A=b.jsonl,tb.jsonl")
    assert status == 2 and "2 environments are called 'A'" in text
    status, text = run(capsys, "matrix", "--env", "../A=a.jsonl,ta.jsonl")
    assert status == 2 and "environment '../A': its name is part of folder names" in text


@pytest.mark.parametrize(
    ("command", "option", "first", "second"),
    [
        ("matrix", "--env", "A=a,b", "B=c,d"),
        ("ablate", "--grid", "matrix.train.steps=1,2", "matrix.seeds=1,2"),
        ("bench", "--trained-on", "a.jsonl", "b.jsonl"),
        ("matrix", "--train.freeze", "vision", "decoder"),
    ],
)
def test_a_list_given_twice_is_refused_since_only_the_last_would_count(capsys, command, option, first, second):
    for arguments in ([option, first, option, second], [f"{option}={first}", option, second]):
        status, text = run(capsys, command, *arguments)
        assert status == 2 and f"{option} is given twice" in text, text


def test_names_of_files_are_no_markup(capsys, tmp_path):
    folder = tmp_path / "x[/b]"
    folder.mkdir(parents=True)
    file = write_pairs(folder, "a[red]", 4)
    file.write_text(file.read_text() + "{}\n")
    status, text = run(capsys, "train", "--data", file, "--out", folder / "run", "--steps", 1, "--batch-size", 8)
    assert status == 0 and "x[/b]/a[red].jsonl" in text.replace("\n", ""), text
    status, text = run(capsys, "audit", file, "--out", folder / "audit")
    assert status == 0 and "x[/b]/audit/report.html" in text.replace("\n", ""), text


def test_what_a_command_does_not_read_is_refused(capsys, tmp_path):
    status, text = run(capsys, "quickstart", "--root", "x", "--out", tmp_path / "o")
    assert status == 2 and "renders its own data" in text
    status, text = run(capsys, "matrix", "--train.objective", "standard")
    assert status == 2 and "Unrecognized options: --train.objective" in text
    status, text = run(capsys, "matrix", "--jobs", 0)
    assert status == 2 and "MatrixConfig.jobs is 0" in text
    status, text = run(capsys, "quickstart", "--objectives", "standrd", "--out", tmp_path / "o")
    assert status == 2 and "'standrd' is not known; do you mean standard?" in text and not (tmp_path / "o").exists()


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


BUSY = """
import hashlib, sys
import mmrm_jax
from mmrm_jax import cli
def busy(argv, console):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without Python's lock, as in a compiler
cli.COMMANDS[sys.argv[1]] = (busy, "")
cli.main()
"""


@pytest.mark.parametrize(
    ("command", "number", "status", "message"),
    [
        ("matrix", signal.SIGINT, 130, "interrupted; give the same command again to go on"),
        ("score", signal.SIGINT, 130, "interrupted"),
        # Preempted while it reads data or a model: there is nothing to save, and a queue is to start it again.
        ("train", signal.SIGTERM, 75, "stopped by SIGTERM; give the same command again to go on"),
        ("train", signal.SIGINT, 130, "interrupted; give the same command again to go on"),
    ],
)
def test_a_signal_is_heard_while_compiling_and_says_how_to_go_on_where_that_helps(command, number, status, message):
    process = subprocess.Popen([sys.executable, "-c", BUSY, command], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors == f"\nmmrm: {message}\n"


def test_a_setting_out_of_range_is_named(capsys, tmp_path):
    status, text = run(capsys, "train", "--data", "d.jsonl", "--out", tmp_path / "o", "--log-every", 0)
    assert status == 2 and "TrainConfig.log_every is 0" in text


def test_a_command_that_never_began_does_not_hold_its_directory(capsys, tmp_path):
    file, out = write_pairs(tmp_path, "a", 2), tmp_path / "m"
    status, text = run(capsys, "matrix", "--env", f"A={file},{tmp_path / 'typo.jsonl'}", "--out", out)
    assert status == 2 and "typo.jsonl" in text and not out.exists()


@pytest.mark.parametrize("command", ["train", "matrix"])
def test_a_set_up_that_failed_does_not_hold_its_directory(capsys, tmp_path, command):
    file, out = write_pairs(tmp_path, "a", 4), tmp_path / "o"
    data, prefix = (("--data", file), "") if command == "train" else (("--env", f"A={file},{file}"), "train.")
    for parts, message in ((("visoin",), "visoin"), (("vision", "projector", "decoder", "score"), "nothing to train")):
        status, text = run(capsys, command, *data, "--out", out, f"--{prefix}freeze", *parts)
        assert status == 2 and message in text and not (out / "config.json").exists(), text


def test_a_result_does_not_overwrite_what_is_no_result(capsys, tmp_path):
    file = write_pairs(tmp_path, "a", 2)
    before = file.read_text()
    prepare = ("prepare", file, "--json")
    status, text = run(capsys, *prepare, file, "--out", tmp_path / "o")
    assert status == 2 and f"--json {file} would overwrite" in text and not (tmp_path / "o").exists()
    assert file.read_text() == before
    (tmp_path / "empty").write_text("")
    for name in ("new", "new", "empty"):
        status, text = run(capsys, *prepare, tmp_path / name, "--out", tmp_path / f"{name}-{len(text)}")
        assert status == 0 and json.loads((tmp_path / name).read_text())["splits"], text


def test_seeds_that_cannot_be_are_refused(capsys, tmp_path):
    for seed in (-1, 2**31):
        status, text = run(capsys, "train", "--data", "x", "--out", tmp_path / "o", f"--seed={seed}")
        assert status == 2 and f"TrainConfig.seed is {seed}; it must be from 0 to 2^31 - 1" in " ".join(text.split()), (
            text
        )


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


def test_a_directory_of_another_kind_is_told_as_that(capsys, tmp_path):
    file, out = write_pairs(tmp_path, "a", 8), tmp_path / "o"
    out.mkdir()
    (out / "config.json").write_text('{"objective": "standard"}')
    status, text = run(capsys, "matrix", "--env", f"A={file},{file}", "--out", out)
    assert status == 2 and f"{out} holds a run and no matrix" in " ".join(text.split()), text
    (out / "config.json").write_text('{"environments": []}')
    status, text = run(capsys, "train", "--data", file, "--out", out, "--data.holdout", 0)
    assert status == 2 and f"{out} holds a matrix and no run" in " ".join(text.split()), text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("from x import (", "SyntaxError: '(' was never closed"),
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        (
            "from mmrm_jax.config import MatrixConfig\nconfig = MatrixConfig(objectves=())",
            "unexpected keyword argument 'objectves'; did you mean 'objectives'?",
        ),
        (
            "from mmrm_jax.config import MatrixConfig\nconfig = MatrixConfig(envs=())",
            "unexpected keyword argument 'envs'; known: environments, image_root",
        ),
        ("def Path(): ...\nPath.__qualname__ = 'Path.__init__'\nPath(x=1)", "unexpected keyword argument 'x'\n"),
    ],
)
def test_a_broken_configuration_is_one_message(capsys, tmp_path, text, told):
    file = tmp_path / "c.py"
    file.write_text(text)
    status, printed = run(capsys, "matrix", file)
    assert status == 2 and f"mmrm: {file}: " in printed and told in printed, printed


def test_a_matrix_directory_is_no_run_to_evaluate(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model": null}')
    status, text = run(capsys, "evaluate", "--run", tmp_path, "--data", "d.jsonl")
    assert status == 2 and "no run of `mmrm train`" in text


def test_a_run_that_diverges_ends_with_a_status_of_its_own(capsys, tmp_path):
    """And names the batch; no checkpoint holds what is not finite."""
    data, out = write_pairs(tmp_path, "a", 16), tmp_path / "run"
    options = ("--steps", 4, "--batch-size", 8, "--data.holdout", 0, "--data.buckets", 1, "--checkpoint-every", 1)
    wild = ("--objective", "standard", "--optimizer.learning-rate", 1e38, "--optimizer.warmup-fraction", 0)
    status, text = run(capsys, "train", "--data", data, "--out", out, *options, *wild)
    assert status == 2 and "lower the learning rate" in " ".join(text.split()), text
    (batch,) = out.glob("batch-*.json")
    found = json.loads(batch.read_text())
    assert len(found["groups"]) == 8 and batch.name in text
    assert all(int(folder.name) < found["step"] for folder in (out / "checkpoints").iterdir())
