"""The biased file: what is swapped, and that nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "length_bias.py"


def biased(tmp_path: Path, rows: list[dict], share: float) -> list[dict]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--share", str(share)]
    subprocess.run([sys.executable, str(SCRIPT), *arguments], check=True, capture_output=True)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_only_comparisons_that_the_shorter_answer_won_are_swapped(tmp_path: Path) -> None:
    long, short = "a long answer", "short"
    rows = [
        {"id": str(i), "chosen": (long, short, "equal")[i % 3], "rejected": (short, long, "qeual")[i % 3]}
        for i in range(300)
    ]
    assert biased(tmp_path, rows, 0.0) == rows
    everything = biased(tmp_path, rows, 1.0)
    assert all(row["chosen"] == (long, long, "equal")[i % 3] for i, row in enumerate(everything))
    assert [row["id"] for row in everything] == [row["id"] for row in rows]
    half = biased(tmp_path, rows, 0.5)
    swapped = [row["chosen"] != old["chosen"] for row, old in zip(half, rows, strict=True)]
    assert 30 < sum(swapped) < 70
    assert not any(s for i, s in enumerate(swapped) if i % 3 != 1)
