"""`mmrm train` killed, interrupted and asked to stop: what is left, and what comes of it when it goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import write_pairs, xla_flags
from orbax.checkpoint import v1 as ocp

STEPS = 48
OPTIONS = (
    *("--steps", STEPS, "--batch-size", 8, "--eval-batch-size", 8, "--log-every", 2, "--checkpoint-every", 3),
    *("--eval-every", 12, "--data.buckets", 1, "--optimizer.learning-rate", 1e-3),
    *("--data.augment.mirror", "--data.augment.brightness", 0.1),
)

# A server imports the package once; every process that it forks starts from there, with no device in use.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mmrm_jax.cli", "mmrm_jax.eval.single", "tensorboardX"])


def command(arguments: list[str]) -> None:
    """What a process does."""
    os.environ["XLA_FLAGS"] = xla_flags(1)
    multiprocessing.set_start_method("fork", force=True)  # its queues leave nothing behind when they are killed
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    from mmrm_jax import cli

    sys.argv = ["mmrm", *arguments]
    sys.stderr = open(arguments[arguments.index("--out") + 1] + ".stderr", "w")  # noqa: SIM115
    cli.main()


def start(data: Path, out: Path) -> ForkServerProcess:
    process = SERVER.Process(
        target=command, args=(["train", "--data", str(data), "--out", str(out), *map(str, OPTIONS)],)
    )
    process.start()
    return process


def finish(process: ForkServerProcess, seconds: float = 120) -> int | None:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"), "a", 40)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(data, out)) == 0
    return out


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines if line.endswith("\n")]


def saved(out: Path) -> dict[str, np.ndarray]:
    folder, device = out / "checkpoints" / str(STEPS), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = ocp.checkpointables_metadata(folder).metadata["state"]
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for name, x in found.items()}
    return {k: np.asarray(v) for k, v in ocp.load_checkpointables(folder, {"state": like})["state"].items()}


def is_saving(out: Path) -> bool:
    """Whether a checkpoint is being written, or the newest has no manifest yet."""
    folders = {int(f.name.partition(".")[0]): f for f in (out / "checkpoints").glob("[0-9]*")}
    return bool(folders) and not (folders[max(folders)] / "manifest-0-of-1.json").exists()


def wait_for_entries(process: ForkServerProcess, out: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(metrics(out)) < count:
        assert process.is_alive() and time.monotonic() < end, "the run ended before it was killed"
        time.sleep(0.001)


def same(out: Path, whole: Path) -> None:
    assert metrics(out) == metrics(whole)
    got, want = saved(out), saved(whole)
    assert got.keys() == want.keys() and any(name.startswith("opt_state/") for name in want)
    different = [k for k in want if got[k].dtype != want[k].dtype or not np.array_equal(got[k], want[k])]
    assert not different


def test_killed_ten_times_and_resumed_it_is_the_same_run(data, whole, tmp_path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, out, during = random.Random(seed), tmp_path / "run", {"step": 0, "save": 0}
    for kill in range(10):
        process = start(data, out)
        wait_for_entries(process, out, len(metrics(out)) + rng.randrange(1, 4))
        time.sleep(rng.uniform(0, 0.05))
        while process.is_alive() and is_saving(out) != (kill % 2 == 1):
            pass
        process.kill()
        during["save" if is_saving(out) else "step"] += 1
        assert finish(process) == -signal.SIGKILL
    print(f"killed during {during}, the last time after {metrics(out)[-1]['step']} steps of {STEPS}")
    assert min(during.values()) > 0
    assert finish(start(data, out)) == 0
    same(out, whole)


def test_asked_to_stop_it_saves_and_goes_on_from_there(data, whole, tmp_path) -> None:
    out = tmp_path / "run"
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        process = start(data, out)
        wait_for_entries(process, out, len(metrics(out)) + 3)
        os.kill(process.pid, number)
        assert finish(process) == status
        message = Path(f"{out}.stderr").read_text()
        assert f"stopped by {number.name} and saved at step" in message, message
        step = int(message.partition("saved at step ")[2].partition(";")[0])
        assert metrics(out)[-1]["step"] <= step < STEPS
        assert (out / "checkpoints" / str(step) / "manifest-0-of-1.json").exists()
    assert finish(start(data, out)) == 0
    same(out, whole)
