"""`benchmarks/cross_matrix.py` on a result of a matrix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cross_matrix.py"


def test_means_over_seeds_as_markdown_and_as_heat_maps(tmp_path: Path) -> None:
    rows = [
        {"objective": name, "train": train, "test": test, "seed": seed, "accuracy": accuracy + seed / 10, "sfd": sfd}
        for name in ("standard", "shortcut_aware", "text_only")
        for train, test, accuracy, sfd in (
            ("a", "a", 0.8, 0.4),
            ("a", "b", 0.3, None),
            ("b", "a", 0.4, -0.1),
            ("b", "b", 0.7, 0),
        )
        for seed in (0, 1)
    ]
    results, plot = tmp_path / "results.json", tmp_path / "plot.png"
    results.write_text(json.dumps({"rows": rows}))
    command = [sys.executable, str(SCRIPT), str(results)]
    done = subprocess.run([*command, "--plot", str(plot)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == [
        "| standard | a | 85.0 (40.0) | 35.0 (–) |",
        "| standard | b | 45.0 (−10.0) | 75.0 (0.0) |",
        "| shortcut_aware | a | 85.0 (40.0) | 35.0 (–) |",
        "| shortcut_aware | b | 45.0 (−10.0) | 75.0 (0.0) |",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run([*command, "--objectives", "lff"], capture_output=True, text=True)
    assert refused.returncode and "has none of lff; it has standard, shortcut_aware, text_only" in refused.stderr
