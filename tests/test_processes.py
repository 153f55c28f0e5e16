"""The same run on other meshes, and in two processes of four devices each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import write_long_and_short, xla_flags
from rich.console import Console

from mmrm_jax.config import DataConfig, MeshConfig, TrainConfig
from mmrm_jax.eval.single import evaluate_run, train_run
from mmrm_jax.models.hf.config import config_to_hf, read_config
from mmrm_jax.models.hf.weights import save_params
from mmrm_jax.sharding import make_mesh
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.state import init_params

QUIET = Console(quiet=True)
CONFIG = TrainConfig(
    objective="standard",
    batch_size=16,
    eval_batch_size=16,
    steps=8,
    mesh=MeshConfig(2, 2, 2),
    data=DataConfig(buckets=2, cache=False),
    log_every=1,
    eval_every=4,
    checkpoint_every=2,
    keep_last=10,
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty pairs, every other one with a long prompt: batches of two shapes. Of two the picture breaks off: they are
    met, and left out, while running."""
    file = write_long_and_short(tmp_path_factory.mktemp("data"), 40)
    for i in (3, 17):
        image = file.parent / "images" / f"a-{i}.png"
        image.write_bytes(image.read_bytes()[:-60])
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The packaged model with a second key and value head, which two tensor-parallel devices need, drawn afresh."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(MODEL_DIR / name, folder)
    packaged = read_config(MODEL_DIR)
    config = dataclasses.replace(packaged, decoder=dataclasses.replace(packaged.decoder, num_kv_heads=2))
    hf = config_to_hf(config, template="chatml-plain", max_tiles=6)
    (folder / "config.json").write_text(json.dumps(hf))
    save_params(folder, config, init_params(config, 0))
    return folder


@pytest.fixture(scope="module")
def whole(data, model, tmp_path_factory) -> Path:
    """The run in one process of eight devices, 2 x 2 x 2."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_run(CONFIG, str(data), out, model, None, QUIET)
    return out


def begun(whole: Path, out: Path, step: int = 2) -> Path:
    """A copy of the run, as if it had been killed after `step`."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("tensorboard"))
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_metrics(out: Path, whole: Path) -> None:
    got, want = metrics(out), metrics(whole)
    assert [e.keys() for e in got] == [e.keys() for e in want] and len(got) == CONFIG.steps
    for a, b in zip(got, want):
        assert {n for n in a if a[n] is None} == {n for n in b if b[n] is None}
        for name in (n for n in a if n != "seconds" and a[n] is not None):
            relative = 0.0 if name.endswith("loss") else TOLERANCE
            np.testing.assert_allclose(a[name], b[name], rtol=relative, atol=TOLERANCE, err_msg=f"{a['step']} {name}")


def unreadable(out: Path) -> set[str]:
    return {json.loads(line)["id"] for line in (out / "unreadable.jsonl").read_text().splitlines()}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1)])
def test_a_checkpoint_goes_on_on_another_mesh(data, model, whole, tmp_path, monkeypatch, sizes) -> None:
    devices = jax.devices()[: int(np.prod(sizes))]
    monkeypatch.setattr("mmrm_jax.train.program.make_mesh", functools.partial(make_mesh, devices=devices))
    out = begun(whole, tmp_path / "run")
    printed = Console(record=True, width=200, file=io.StringIO())
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(*sizes), micro_batches=2)
    train_run(config, str(data), out, model, None, printed)
    text = printed.export_text()
    assert "going on from step 2" in text and "changed since the run began: micro_batches: 1 -> 2" in text
    assert "mesh.fsdp: 2 -> 1" in text
    same_metrics(out, whole)


class Two:
    """Two processes that run one command, or another program, together."""

    def __init__(self, folder: Path, *arguments: object, program: str = "from mmrm_jax.cli import main; main()"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs, self.processes = [folder / f"log-{i}" for i in range(2)], []
        for i, log in enumerate(self.logs):
            own = {"MMRM_COORDINATOR": address, "MMRM_NUM_PROCESSES": "2", "MMRM_PROCESS_ID": str(i)}
            own |= {"XLA_FLAGS": xla_flags(4)}
            own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            command = [sys.executable, "-c", program, *map(str, arguments)]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(command, env=os.environ | own, stdout=file, stderr=subprocess.STDOUT)
                )

    def wait(self, seconds: float = 500) -> list[int]:
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    def said(self) -> str:
        return "\n".join(f"{log}:\n{log.read_text()}" for log in self.logs)


def options(config: TrainConfig) -> list[object]:
    return [
        *("--steps", config.steps, "--batch-size", config.batch_size, "--eval-batch-size", config.eval_batch_size),
        *("--objective", config.objective, "--log-every", 1, "--eval-every", 4, "--checkpoint-every", 2),
        *("--data.buckets", 2, "--data.no-cache", "--mesh.data", 4, "--mesh.fsdp", 2, "--keep-last", 2),
    ]


def test_two_processes_stop_together_go_on_together_and_agree_with_one(data, model, whole, tmp_path) -> None:
    out = begun(whole, tmp_path / "run")
    arguments = ("train", "--model", model, "--data", data, "--out", out, *options(CONFIG))
    two = Two(tmp_path, *arguments)
    while two.processes[1].poll() is None and not (out / "tensorboard").exists():
        time.sleep(0.01)  # until training begins, with the compilation of its first step
    two.processes[1].send_signal(signal.SIGTERM)  # to one of them
    assert two.wait() == [75, 75], two.said()
    assert "going on from step 2" in two.logs[0].read_text() and "going on" not in two.logs[1].read_text()
    stopped = max(int(f.name) for f in (out / "checkpoints").iterdir())
    assert 3 <= stopped < CONFIG.steps and f"saved at step {stopped};" in two.logs[1].read_text()

    two = Two(tmp_path, *arguments)
    assert two.wait() == [0, 0], two.said()
    assert f"going on from step {stopped}" in two.logs[0].read_text()
    same_metrics(out, whole)
    assert sorted(int(f.name) for f in (out / "checkpoints").iterdir()) == [6, 8]
    assert unreadable(out) == unreadable(whole) == {"3", "17"} and not list(out.glob("*process*"))
    assert len(list((out / "tensorboard").iterdir())) == 2  # one file a command, of the main process

    # What two processes saved, one evaluates, and two evaluate what it was: everything alike.
    two = Two(tmp_path, "evaluate", "--run", out, "--data", data, "--json", tmp_path / "two.json")
    assert two.wait() == [0, 0], two.said()
    found = json.loads((tmp_path / "two.json").read_text())
    alone = json.loads(json.dumps(evaluate_run(out, str(data), None, QUIET)))
    assert {q["id"] for q in found["quarantined"]} == {q["id"] for q in alone["quarantined"]} == {"3", "17"}
    for name, value in alone["row"].items():
        if isinstance(value, float):
            assert found["row"][name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name
        else:
            assert found["row"][name] == value, name


def test_two_processes_make_the_features_of_a_frozen_tower(data, model, whole, tmp_path) -> None:
    """On a mesh that splits the tower; two pictures break off. The run goes on as it did without features."""
    out, folder = begun(whole, tmp_path / "run", 6), tmp_path / "features"
    (out / "unreadable.jsonl").unlink()
    named = ("--data.features", folder)
    two = Two(tmp_path, "train", "--model", model, "--data", data, "--out", out, *options(CONFIG), *named)
    assert two.wait() == [0, 0], two.said()
    assert "features of 40 images, 38 of them made now" in " ".join(two.logs[0].read_text().split())
    assert len(list(folder.rglob("*.safetensors"))) == 39  # and that of the blank tile
    same_metrics(out, whole)
    assert unreadable(out) <= unreadable(whole)


def test_a_process_that_fails_alone_ends_the_other(data, tmp_path) -> None:
    """A picture that breaks off is in one process's share; in strict mode that one stops, and the other with it."""
    out, command = tmp_path / "run", "from mmrm_jax.cli import main; main()"
    # Ten seconds without a sign of life tell that a process has ended, where JAX takes a hundred.
    quick = "import functools, jax; d = jax.distributed; "
    quick += "d.initialize = functools.partial(d.initialize, heartbeat_timeout_seconds=10); " + command
    two = Two(tmp_path, "train", "--data", data, "--out", out, *options(CONFIG), "--strict", program=quick)
    status = two.wait()
    assert 0 not in status and 2 in status, two.said()
    assert "row 4" in two.said() or "row 18" in two.said()


OPENING = """
import dataclasses, json, os, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, of: event == "open" and str(of[0]).endswith(".png") and opened.append(str(of[0])))
from rich.console import Console
from mmrm_jax import distributed
from mmrm_jax.config import DataConfig, TrainConfig
from mmrm_jax.eval.evaluate import image_clusters
from mmrm_jax.eval.single import open_run
distributed.initialize()
data, out = map(Path, sys.argv[1:])
run = open_run(TrainConfig(data=DataConfig(cache=False)), str(data), out, None, None, Console(quiet=True))
found = {
    "fingerprints": run.settings["fingerprints"],
    "kept": [run.train.kept, run.validation.kept],
    "shapes": [dataclasses.asdict(shape) for shape in run.train.shapes],
    "clusters": image_clusters(run.validation).tolist(),
}
name = "opened-" + os.environ.get("MMRM_PROCESS_ID", "alone")
Path(out.parent, name).write_text(json.dumps({"found": found, "opened": opened}))
distributed.shutdown()
"""


def test_two_processes_share_the_reading_that_a_run_begins_with(data, tmp_path) -> None:
    """Hashes of the images, for the hold-out and for `config.json`, and the sizes of groups."""
    file = tmp_path / "data.jsonl"
    row = json.loads(data.read_text().splitlines()[0]) | {"id": "long", "chosen": "word " * 5000}
    images = {"images": str(data.parent / "images")}
    file.write_text((data.read_text() + json.dumps(row) + "\n").replace("images/", images["images"] + "/"))
    subprocess.run([sys.executable, "-c", OPENING, file, tmp_path / "alone"], check=True)
    two = Two(tmp_path, file, tmp_path / "two", program=OPENING)
    assert two.wait() == [0, 0], two.said()
    alone, *each = (json.loads((tmp_path / f"opened-{name}").read_text()) for name in ("alone", 0, 1))
    assert [found["found"] for found in each] == [alone["found"]] * 2
    assert (tmp_path / "two" / "quarantine.jsonl").read_text() == (tmp_path / "alone" / "quarantine.jsonl").read_text()
    assert "long" in (tmp_path / "two" / "quarantine.jsonl").read_text()
    counts = [len(found["opened"]) for found in each]
    assert len(alone["opened"]) > 100 and max(counts) < 0.6 * len(alone["opened"])
    assert sum(counts) == len(alone["opened"]) + 2  # each hashes the image that the first and the last row show
