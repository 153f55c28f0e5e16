"""Seconds from the command to the first training step, and to the first scores.

    python benchmarks/startup.py --size big --json startup.json

Every measurement is a fresh process: the interpreter, imports, the model from its files, compilation and the first call
on the pairs of `train_pairs.py`. mmrm_jax is measured without JAX's persistent compilation cache and with one that an
earlier process has filled; torch compiles nothing.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from common import CONSOLE, SIZES, Options, make_examples, run_alone, saved_model, write
from rich.table import Table

KINDS = ("ours", "ours, cached", "torch")
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


@dataclasses.dataclass(frozen=True)
class StartupOptions(Options):
    """Attributes:
    task: What is done first; both in turn where it is not given.
    """

    task: Literal["train", "score"] | None = None


def start(options: StartupOptions) -> dict[str, float]:
    """Import, load and call once; when each was done, on the clock that processes share."""
    assert options.folder is not None, "--only needs --folder"
    examples = make_examples(SIZES[options.size], 2, [(0, 1)], "blank")
    if options.only == "ours":
        import ours as side

        from mmrm_jax.config import TrainConfig

        train: tuple = (TrainConfig(proxy_input="blank", batch_size=len(examples)),)
        score: tuple = (examples[:1],)
    else:
        import torch_peer as side

        train, score = ("blank", len(examples)), (examples[0], 2)
    imported = time.time()
    made = (
        side.Training(options.folder, examples, *train)
        if options.task == "train"
        else side.Scoring(options.folder, *score)
    )
    loaded = time.time()
    made.step()
    return {"imported": imported, "loaded": loaded, "done": time.time()}


def measure(
    options: StartupOptions, kind: str, task: str, folder: Path, environment: dict[str, str]
) -> dict[str, float]:
    """Seconds of each part of a fresh process."""
    side = kind.split(",")[0]
    given = ["--size", options.size, "--folder", str(folder), "--task", task, "--only", side]
    begun = time.time()
    found = run_alone(__file__, given, environment)
    done = [begun, *(found[part] for part in ("imported", "loaded", "done"))]
    names = ("import_s", "load_s", "first_call_s")
    return dict(zip(names, np.diff(done).tolist())) | {"total_s": done[-1] - begun}


def run(options: StartupOptions, task: str, folder: Path) -> dict[str, Any]:
    """Medians by kind, the kinds measured in turn."""
    with tempfile.TemporaryDirectory() as cache:
        plain = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        cached = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environments = {kind: plain | (cached if "cached" in kind else NO_CACHE) for kind in KINDS}
        for kind in ("ours, cached", "torch"):  # fills the cache, and that of files
            measure(options, kind, task, folder, environments[kind])
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(options.repeats):
            for kind, kept in runs.items():
                kept.append(measure(options, kind, task, folder, environments[kind]))
    return {
        kind: {part: float(np.median([r[part] for r in kept])) for part in kept[0]} | {"runs": kept}
        for kind, kept in runs.items()
    }


def main() -> None:
    """Both tasks as a table and as JSON."""
    options = tyro.cli(StartupOptions, description=__doc__)
    if options.only:
        write(options, start(options))
        return
    with saved_model(options) as folder:
        results = {
            task: run(options, task, folder) for task in ((options.task,) if options.task else ("train", "score"))
        }
    table = Table(
        "", "", "import, s", "load, s", "first call, s", "in all, s", title=f"From the command, {options.size}"
    )
    for task, kinds in results.items():
        for kind, r in kinds.items():
            parts = (f"{r[part]:.2f}" for part in ("import_s", "load_s", "first_call_s", "total_s"))
            table.add_row(f"first {'step' if task == 'train' else 'scores'}", kind, *parts)
    CONSOLE.print(table)
    write(options, {"results": results})


if __name__ == "__main__":
    main()
