"""Every benchmark runs at its small size, and its result has what its table shows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import xla_flags

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NO_TORCH = "comparing with torch needs torch: pip install -e '.[test,parity]'"
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason=NO_TORCH)


def run(tmp_path: Path, script: str, *arguments: str) -> dict:
    """Results of a benchmark on one device, as for a user; the tests' own has eight."""
    out = tmp_path / "result.json"
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    command = [sys.executable, str(BENCHMARKS / script), "--repeats", "1", "--json", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["results"]


@needs_torch
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train_pairs.py", ["--proxy", "absent"]),
        ("train_groups.py", ["--proxy", "blank"]),
        ("best_of_n.py", ["--responses", "6", "--batch", "4"]),
    ],
)
def test_comparisons_with_torch(script: str, arguments: list[str], tmp_path: Path) -> None:
    (result,) = run(tmp_path, script, *arguments).values()
    assert result["largest_difference_of_rewards"] <= 1e-4
    assert result["speedup"] == pytest.approx(result["median_s"]["torch"] / result["median_s"]["ours"])
    assert all(result["peak_mib"][side] > 100 for side in ("ours", "torch"))


@needs_torch
def test_startup(tmp_path: Path) -> None:
    results = run(tmp_path, "startup.py", "--task", "score")["score"]
    assert results.keys() == {"ours", "ours, cached", "torch"}
    assert all(0 < r["first_call_s"] < r["total_s"] for r in results.values())


@needs_torch
def test_data_loading(tmp_path: Path) -> None:
    results = run(tmp_path, "data_loading.py", "--images", "40", "--workers", "1")["1"]
    assert all(results[side]["images_per_s"] > 0 for side in ("ours", "torch"))


def test_bound(tmp_path: Path) -> None:
    for result in run(tmp_path, "bound.py").values():
        assert result["least_s"] == pytest.approx(result["shared_flops"] / result["flops_per_second"])
        assert 1 < result["most_gain"] <= 2 and 0 < result["share"] < 1


def test_cost_scaling(tmp_path: Path) -> None:
    sizes = ("--comparisons", "1", "3", "--responses", "2", "3")
    results = run(tmp_path, "cost_scaling.py", "--plot", str(tmp_path / "plot.png"), *sizes)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert results["responses"]["x"] == [2, 3] and results["objectives"]["sfc_share"] < 1
