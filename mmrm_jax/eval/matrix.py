"""The cross-distribution matrix: objective x training environment x seed, each tested on every environment."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mmrm_jax.config import MatrixConfig, TrainConfig, differences, to_json
from mmrm_jax.data.batching import Buckets
from mmrm_jax.data.pipeline import BatchPlan, EncodedSource, MakeBatch, batches, buckets_for
from mmrm_jax.eval.evaluate import Evaluation, evaluate, image_clusters
from mmrm_jax.eval.metrics import CellScores
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.checkpoint import check_config
from mmrm_jax.train.loop import resume, train
from mmrm_jax.train.program import Program, build_program, find_objective
from mmrm_jax.train.progress import make_progress, task
from mmrm_jax.train.setup import (
    Checkpoint,
    encode,
    initial_params,
    merged_views,
    open_checkpoint,
    open_spec,
    training_sources,
)
from mmrm_jax.types import Quarantined

PROXY = "proxy"  # the branch of shortcut-aware training that is a text-only model


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded training and test sets by name, the buckets that cover them all, and what was left out."""

    train: dict[str, EncodedSource]
    test: dict[str, EncodedSource]
    iid: dict[str, str]
    buckets: Buckets
    quarantined: list[Quarantined]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of the matrix."""

    objective: str
    train: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.train}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class CellResult:
    """What a run leaves behind: its evaluation on every test set, its history and its seconds."""

    cell: Cell
    evaluations: dict[str, Evaluation]
    history: list[dict[str, Any]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Matrix:
    """All runs of a configuration, with the data they were tested on."""

    config: MatrixConfig
    data: Data
    results: list[CellResult]
    seconds: float


def trained_objectives(objectives: tuple[str, ...]) -> list[str]:
    """The objectives that need a run: text-only training is the proxy's half of shortcut-aware training."""
    skip = {"text_only"} if "shortcut_aware" in objectives else set()
    return [o for o in objectives if o not in skip]


def load_data(config: MatrixConfig, checkpoint: Checkpoint, console: Console) -> Data:
    """Open and measure every set. On "validation" the held-out parts of the training sets are the test sets."""
    views = merged_views(map(find_objective, config.objectives), config.train)
    quarantined: list[Quarantined] = []
    train_sets: dict[str, EncodedSource] = {}
    test_sets: dict[str, EncodedSource] = {}
    iid: dict[str, str] = {}

    def add(into: dict[str, EncodedSource], name: str, source: Any) -> None:
        into[name], bad = encode(source, checkpoint, views, config.train, name=name, console=console)
        quarantined.extend(bad)

    for env in config.environments:
        held_out = None
        spec = env.test if config.on == "test" else env.validation
        test_name = env.label(spec or env.train or env.test)
        if env.train is not None:
            name = env.label(env.train)
            source, held_out, bad = training_sources(env.train, config.root, config.image_root, config.train)
            quarantined.extend(bad)
            add(train_sets, name, source)
            iid[name] = test_name
        if spec is not None:
            source, bad = open_spec(spec, config.root, config.image_root)
            quarantined.extend(bad)
            add(test_sets, test_name, source)
        elif held_out is not None:
            add(test_sets, test_name, held_out)
    if not train_sets or not test_sets:
        raise ValueError("the matrix needs an environment with training data and a test set (or a hold-out)")
    buckets = buckets_for([*train_sets.values(), *test_sets.values()], config.train.data.buckets)
    return Data(train_sets, test_sets, iid, buckets, quarantined)


def training_steps(config: TrainConfig, groups: int) -> int:
    """`steps`, or as many as `epochs` passes over the groups take."""
    return config.steps if config.steps is not None else max(1, round(config.epochs * groups / config.batch_size))


def run_matrix(config: MatrixConfig, console: Console) -> Matrix:
    """Train and test every cell. A cell that an interrupted run has finished is read back, not trained again.

    Raises CheckpointError where `config.out` holds a matrix of another configuration.
    """
    start = time.monotonic()
    resolved = to_json(dataclasses.replace(config, out=Path(".")))
    saved = config.out / "config.json"
    check_config(config.out, resolved, differences(json.loads(saved.read_text()), resolved) if saved.exists() else [])
    checkpoint = open_checkpoint(config.model or MODEL_DIR, config.train.data)
    data = load_data(config, checkpoint, console)
    results = []
    cells = [
        Cell(objective, name, seed)
        for seed in range(config.seeds)
        for objective in trained_objectives(config.objectives)
        for name in data.train
    ]
    programs: dict[tuple[str, int], Program] = {}
    with make_progress(console) as progress:
        overall = progress.add_task("matrix", total=len(cells), metrics="")
        for cell in cells:
            folder = config.out / "cells" / cell.name
            result = read_cell(folder, cell)
            if result is None:
                settings = dataclasses.replace(
                    config.train, objective=cell.objective, seed=config.train.seed + cell.seed
                )
                steps = training_steps(settings, len(data.train[cell.train]))
                key = (cell.objective, steps)
                if key not in programs:
                    programs[key] = build_program(checkpoint.config, settings, steps)
                with task(progress, cell.name, steps) as report:
                    result = run_cell(cell, programs[key], checkpoint, data, settings, steps, folder, report)
                write_cell(folder, result)
            results.append(result)
            progress.advance(overall)
    return Matrix(config, data, results, time.monotonic() - start)


def run_cell(
    cell: Cell,
    program: Program,
    checkpoint: Checkpoint,
    data: Data,
    config: TrainConfig,
    steps: int,
    folder: Path,
    report: Callable[[int, dict[str, float]], None],
) -> CellResult:
    """Train one model and evaluate it on every test set."""
    source = data.train[cell.train]
    plan = BatchPlan([s.response for s in source.shapes], config.batch_size, config.seed, steps)
    folder.mkdir(parents=True, exist_ok=True)
    quarantine = folder / "quarantine.jsonl"
    make = MakeBatch(
        source,
        data.buckets,
        config.batch_size,
        config.micro_batches,
        quarantine=quarantine,
        strict=config.strict,
    )
    params, _ = initial_params(checkpoint, config.seed)
    state = resume(program, program.init(params, config), folder)
    stream = batches(plan, make, start=int(state.step), workers=config.data.workers)
    result = train(program, state, stream, config, steps=steps, run_dir=folder, report=report)
    evaluations = {
        name: evaluate(
            program, result.state, test, data.buckets, batch_size=config.eval_batch_size, quarantine=quarantine
        )
        for name, test in data.test.items()
    }
    return CellResult(cell, evaluations, result.history, result.seconds)


def write_cell(folder: Path, result: CellResult) -> None:
    """Save a result; `cell.json` is written last and whole, so its presence means the cell is finished."""
    arrays: dict[str, np.ndarray] = {}
    rewards: dict[str, dict[str, float]] = {}
    for test, e in result.evaluations.items():
        arrays |= {f"{test}/{k}": getattr(e, k) for k in ("group", "winner", "loser", "tie")}
        arrays |= {f"{test}/margins/{b}": m for b, m in e.margins.items()}
        arrays |= {} if e.sfc is None else {f"{test}/sfc": e.sfc}
        rewards[test] = e.mean_reward
    np.savez(folder / "evaluations.npz", **arrays)  # type: ignore[arg-type]
    summary = {"seconds": result.seconds, "mean_reward": rewards, "history": result.history}
    part = folder / "cell.json.part"
    part.write_text(json.dumps(summary) + "\n")
    part.rename(folder / "cell.json")


def read_cell(folder: Path, cell: Cell) -> CellResult | None:
    """The result saved in `folder`, or None where the cell is not finished."""
    if not (folder / "cell.json").exists():
        return None
    summary = json.loads((folder / "cell.json").read_text())
    evaluations = {}
    with np.load(folder / "evaluations.npz") as f:
        for test, rewards in summary["mean_reward"].items():
            evaluations[test] = Evaluation(
                **{k: f[f"{test}/{k}"] for k in ("group", "winner", "loser", "tie")},
                margins={b: f[f"{test}/margins/{b}"] for b in rewards},
                sfc=f.get(f"{test}/sfc"),
                mean_reward=rewards,
            )
    return CellResult(cell, evaluations, summary["history"], summary["seconds"])


def scores(matrix: Matrix) -> Iterator[CellScores]:
    """Every model on every test set, the text-only models included.

    The text-only model of an environment and seed comes from its own run or from the shortcut-aware run's proxy.
    """
    text = {
        (r.cell.train, r.cell.seed): r for r in matrix.results if PROXY in find_objective(r.cell.objective).branches
    }
    wanted = matrix.config.objectives
    for result in matrix.results:
        cell, own = result.cell, find_objective(result.cell.objective)
        shortcut = text.get((cell.train, cell.seed))
        for test, e in result.evaluations.items():
            clusters = image_clusters(matrix.data.test[test], e)
            common = {
                "train": cell.train,
                "test": test,
                "seed": cell.seed,
                "shortcut_margins": None if shortcut is None else shortcut.evaluations[test].margins[PROXY],
                "clusters": clusters,
                "tie": e.tie,
            }
            yield CellScores(
                objective=cell.objective,
                margins=e.margins[own.scores],
                mean_reward=e.mean_reward[own.scores],
                sfc=e.sfc,
                **common,
            )
            if own.name == "shortcut_aware" and "text_only" in wanted:
                yield CellScores(
                    objective="text_only",
                    margins=e.margins[PROXY],
                    mean_reward=e.mean_reward[PROXY],
                    sfc=None,
                    **common,
                )
