"""What the comparisons share: sizes, the same inputs for both sides, interleaved timing, memory, tables and JSON.

Nothing here imports JAX or torch, so that a process that runs one side alone holds nothing of the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compared with torch on a CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CLOSE = 1e-4
CONSOLE = Console(width=None if sys.stdout.isatty() else 120)  # wide enough for every table


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its input. `text` is how many tokens of the prompt are not the image's; `lengths` are the shortest
    and the longest response; `vision` and `decoder` are fields of mmrm_jax's configuration."""

    vision: Mapping[str, int]
    decoder: Mapping[str, int]
    groups: int
    tiles: int
    text: int
    lengths: tuple[int, int]

    @property
    def image_token(self) -> int:
        return self.decoder["vocab_size"] - 1

    @property
    def visual_tokens(self) -> int:
        """Of one tile, after 2 x 2 patches have become one."""
        return (self.vision["image_size"] // self.vision["patch_size"] // 2) ** 2


SIZES: Mapping[str, Size] = {
    "small": Size(
        {"image_size": 28, "patch_size": 7, "width": 16, "mlp_width": 32, "num_layers": 2, "num_heads": 2},
        {"vocab_size": 64, "width": 32, "mlp_width": 48, "num_layers": 2}
        | {"num_heads": 4, "num_kv_heads": 2, "head_width": 8},
        groups=2,
        tiles=2,
        text=8,
        lengths=(3, 6),
    ),
    "big": Size(
        {"image_size": 448, "patch_size": 14, "width": 256, "mlp_width": 1024, "num_layers": 6, "num_heads": 8},
        {"vocab_size": 8192, "width": 512, "mlp_width": 1408, "num_layers": 8}
        | {"num_heads": 8, "num_kv_heads": 4, "head_width": 64},
        groups=2,
        tiles=4,
        text=40,
        lengths=(30, 60),
    ),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One image and prompt with its responses as token ids; an image token for every visual token.

    `proxy` is the prompt as the text-only branch sees it: with one blank tile or with none.
    """

    prefix: np.ndarray
    proxy: np.ndarray
    tiles: np.ndarray  # uint8 [T, S, S, 3]
    responses: tuple[np.ndarray, ...]
    comparisons: tuple[tuple[int, int], ...]


def make_examples(
    size: Size, responses: int, comparisons: Sequence[tuple[int, int]], proxy: str, groups: int | None = None
) -> list[Example]:
    """Random examples, the same in every process."""
    rng = np.random.default_rng(0)
    side, made = size.vision["image_size"], []
    for _ in range(size.groups if groups is None else groups):
        text = rng.integers(size.image_token, size=size.text)
        lengths = rng.integers(size.lengths[0], size.lengths[1] + 1, size=responses)
        blank = size.visual_tokens if proxy == "blank" else 0
        made.append(
            Example(
                _with_image(text, size.tiles * size.visual_tokens, size.image_token),
                _with_image(text, blank, size.image_token),
                rng.integers(256, size=(size.tiles, side, side, 3), dtype=np.uint8),
                tuple(rng.integers(size.image_token, size=n) for n in lengths),
                tuple(comparisons),
            )
        )
    return made


def _with_image(text: np.ndarray, visual: int, token: int) -> np.ndarray:
    return np.concatenate([text[:4], np.full(visual, token), text[4:]])


@dataclasses.dataclass(frozen=True)
class Options:
    """Attributes:
    size: small takes seconds; big is what figures are quoted for.
    repeats: Timed runs of each side, in turn.
    json: File that the result is written to.
    only: Run one side alone and report its time and the peak memory of its process.
    folder: The checkpoint that both sides load; by default it is made for the occasion.
    """

    size: Literal["small", "big"] = "small"
    repeats: int = 5
    json: Path | None = None
    only: Literal["ours", "torch"] | None = None
    folder: Path | None = None


class Side(Protocol):
    """One implementation with its model and its input loaded."""

    def rewards(self) -> dict[str, np.ndarray]:
        """Of every response, by branch."""
        ...

    def step(self) -> dict[str, Any]:
        """What is timed; returns numbers that both sides must agree on at the first call."""
        ...


def require_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest difference, relative to numbers above 1; where it is too large the two have not done the same, and
    the benchmark ends."""
    if ours.keys() != theirs.keys():
        raise SystemExit(f"nothing is timed: ours gives {', '.join(ours)}, torch {', '.join(theirs)}")
    largest = 0.0
    for name, a in ours.items():
        b = np.asarray(theirs[name])
        difference = float(np.max(np.abs(np.asarray(a) - b) / np.maximum(1, np.abs(b))))
        if not difference <= CLOSE:
            raise SystemExit(f"nothing is timed: {name} differs by {difference:.2e}, more than {CLOSE:g}")
        largest = max(largest, difference)
    return largest


def interleaved(steps: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, in turn, so that whatever else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_mib() -> float:
    """The most memory that this process has held.

    Linux hands `ru_maxrss` on from parent to child; /proc knows the process alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def run_alone(script: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a benchmark writes to its JSON file in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, script, *arguments, "--json", str(out)]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ran.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{ran.stdout}{ran.stderr}")
        return json.loads(out.read_text())


@contextlib.contextmanager
def saved_model(options: Options) -> Iterator[Path]:
    """The checkpoint that both sides load, made by a process of its own, whose memory is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        if options.folder is None:
            script = Path(__file__).with_name("ours.py")
            subprocess.run([sys.executable, script, options.size, folder], check=True)
        yield options.folder or Path(folder)


def measure_alone(make: Callable[[], Side], options: Options) -> dict[str, Any]:
    """Time and peak memory of one side, in this process."""
    step = make().step
    step()
    start = time.process_time()
    seconds = interleaved({"side": step}, options.repeats)["side"]
    cpu = (time.process_time() - start) / options.repeats
    return {"seconds": seconds, "cpu_s": cpu, "peak_mib": peak_mib()}


def compare(
    script: str, sides: Mapping[str, Callable[[Path], Side]], options: Options, folder: Path, *extra: str
) -> dict[str, Any]:
    """Both sides in turn, after a check that they agree; `extra` arguments tell a process of its own what to run."""
    given = ["--size", options.size, "--folder", str(folder), "--repeats", "2", *extra]
    alone = {name: run_alone(script, [*given, "--only", name]) for name in sides}
    loaded = {name: make(folder) for name, make in sides.items()}
    rewards = [side.rewards() for side in loaded.values()]
    difference = require_equal(*rewards)
    require_equal(*(side.step() for side in loaded.values()))
    seconds = interleaved({name: side.step for name, side in loaded.items()}, options.repeats)
    return summary(seconds, alone) | {"largest_difference_of_rewards": difference}


def summary(seconds: Mapping[str, list[float]], alone: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Medians, and torch over ours: how much faster, and how much less memory."""
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    rounds = np.asarray(seconds["torch"]) / np.asarray(seconds["ours"])
    peaks = {name: result["peak_mib"] for name, result in alone.items()}
    return {
        "seconds": dict(seconds),
        "median_s": medians,
        "speedup": medians["torch"] / medians["ours"],
        "speedup_of_rounds": [float(rounds.min()), float(rounds.max())],
        "alone": {name: {k: result[k] for k in ("seconds", "cpu_s")} for name, result in alone.items()},
        "peak_mib": peaks,
        "memory_ratio": peaks["ours"] / peaks["torch"],
    }


def show(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of `summary` results, a row each."""
    columns = ("", "ours, s", "torch, s", "speed-up (rounds)", "ours, MiB", "torch, MiB", "memory")
    table = Table(*columns, title=title)
    for name, r in results.items():
        low, high = r["speedup_of_rounds"]
        table.add_row(
            name,
            *(f"{r['median_s'][side]:.3g}" for side in ("ours", "torch")),
            f"{r['speedup']:.2f}x ({low:.2f}-{high:.2f})",
            *(f"{r['peak_mib'][side]:.0f}" for side in ("ours", "torch")),
            f"{r['memory_ratio']:.2f}x",
        )
    CONSOLE.print(table)


def write(options: Any, result: Mapping[str, Any]) -> None:
    """The result as JSON, with what it was measured on."""
    if options.json is None:
        return
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
    options.json.write_text(json.dumps({"machine": machine(), "settings": settings, **result}, indent=2) + "\n")


def machine() -> dict[str, Any]:
    packages = {}
    for name in ("mmrm-jax", "jax", "jaxlib", "torch", "transformers", "numpy", "pillow"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "packages": packages,
    }
