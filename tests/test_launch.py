"""What lies in launch/ is what its headers say: scripts and manifests are valid, local runs and the notebook run."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from commands import write_pairs, xla_flags
from nbclient import NotebookClient

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
CALL_MAIN = "import sys; from mmrm_jax.cli import main; sys.argv[0] = 'mmrm'; sys.exit(main())"


def header(path: Path) -> str:
    """The comment that a file begins with, without its marks."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#!")]
    end = next(i for i, line in enumerate(lines) if not line.startswith("#") or line.startswith("#SBATCH"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run(
        [shellcheck if shellcheck.exists() else "shellcheck", script], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "gke_jobset.yaml"], ids=lambda p: p.name)
def test_a_files_header_gives_the_command_that_runs_it(path: Path) -> None:
    assert f"launch/{path.name}" in header(path)


def test_the_jobset_is_one_run_on_all_hosts_of_a_slice() -> None:
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert replicated["replicas"] == 1 and job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == int(shape[0]) * int(shape[1]) * int(shape[2])
    assert {"name": "MMRM_DISTRIBUTED", "value": "auto"} in container["env"]
    assert pod["restartPolicy"] == "Never" and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert container["command"][:2] == ["mmrm", "train"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.fixture(scope="module")
def train_help() -> str:
    command = [sys.executable, "-c", CALL_MAIN, "train", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "gke_jobset.yaml"], ids=lambda p: p.name)
def test_options_in_launch_files_are_those_of_the_command(path: Path, train_help: str) -> None:
    """Options of `mmrm train` that a header or manifest names; those of other programs stand before it."""
    text = path.read_text().replace("\\\n", " ")
    found = {flag for line in text.splitlines() if " train " in line for flag in flags(line.partition(" train ")[2])}
    if path.suffix == ".yaml":
        command = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        found = {flag for word in command["containers"][0]["command"] for flag in flags(word)}
    assert found
    assert not [flag for flag in sorted(found) if not re.search(rf"{flag}(?![\w-])", train_help)]


def flags(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)


def mmrm_script(folder: Path) -> Path:
    """`mmrm` as an executable file, with this interpreter."""
    script = folder / "mmrm"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(CALL_MAIN)} "$@"\n')
    script.chmod(0o755)
    return script


def local(processes: int, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess:
    """`launch/local.sh` with two devices a process."""
    environment = os.environ | {"MMRM": str(mmrm_script(tmp_path)), "XLA_FLAGS": xla_flags(2)}
    command = ["bash", LAUNCH / "local.sh", str(processes), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def test_two_local_processes_train_one_model(tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path, "pairs", 10), tmp_path / "run"
    options = ["--objective", "standard", "--steps", 2, "--batch-size", 4, "--log-every", 1, "--mesh.fsdp", 2]
    options += ["--data.holdout", 0, "--data.max-tiles", 1]
    result = local(2, tmp_path, "train", "--data", data, "--out", out, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert (out / "checkpoints" / "2").is_dir()


def test_a_failing_process_stops_the_others(tmp_path: Path) -> None:
    result = local(2, tmp_path, "train", "--data", tmp_path / "missing.jsonl", "--out", tmp_path / "run")
    assert result.returncode == 2 and "missing.jsonl" in result.stderr


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process_once_and_each_may_save(tmp_path: Path, sent, status) -> None:
    trainer = tmp_path / "trainer"
    trainer.write_text(
        "#!/bin/bash\n"
        'save() { trap "touch twice-$MMRM_PROCESS_ID" TERM INT; sleep 0.$((MMRM_PROCESS_ID + 1)); '
        "touch saved-$MMRM_PROCESS_ID; exit $1; }\n"
        "trap 'save 75' TERM; trap 'save 130' INT; touch ready-$MMRM_PROCESS_ID\n"
        "for i in {1..600}; do sleep 0.1; done\n"
    )
    trainer.chmod(0o755)
    heeding = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
    launcher = subprocess.Popen(  # a job in the background ignores SIGINT, and bash cannot undo that
        [sys.executable, "-c", heeding, "bash", LAUNCH / "local.sh", "3", "train"],
        cwd=tmp_path,
        env=os.environ | {"MMRM": str(trainer)},
    )
    while len(list(tmp_path.glob("ready-*"))) < 3 and launcher.poll() is None:
        time.sleep(0.01)
    launcher.send_signal(sent)
    assert launcher.wait(30) == status
    assert len(list(tmp_path.glob("saved-*"))) == 3 and not list(tmp_path.glob("twice-*"))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(LAUNCH / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    mmrm_script(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    monkeypatch.setenv("MMRM_STEPS", "2")
    monkeypatch.setenv("MMRM_COMPARISONS", "128")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "quickstart" / "report.html").is_file()
    assert "text/html" in notebook.cells[-1].outputs[0].data
