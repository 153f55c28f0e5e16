"""Commands as a user gives them, and small preference files to give them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from mmrm_jax import cli

FAST = ["--train.batch-size", "8", "--train.log-every", "1", "--train.eval-batch-size", "8"]


def run(capsys, *arguments: object) -> tuple[int, str]:
    """Exit status and everything printed."""
    try:
        cli.run([*map(str, arguments)])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of this session with another number of fake devices, for a process that is started."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


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


def write_long_and_short(folder: Path, count: int) -> Path:
    """`write_pairs` with a long prompt in every other row: batches of two shapes."""
    file = write_pairs(folder, "a", count)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::2]:
        row["prompt"] *= 12
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
