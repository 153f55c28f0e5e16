"""The cross-distribution matrix: objective x training environment x seed, each tested on every environment."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mmrm_jax.config import RESUMABLE, MatrixConfig, TrainConfig, to_json
from mmrm_jax.data.quarantine import keep_quarantine, refused_file
from mmrm_jax.data.records import read_quarantine, summarise_quarantine, write_quarantine
from mmrm_jax.eval.evaluate import Evaluation, evaluate, image_clusters
from mmrm_jax.eval.matrix_data import Data, fingerprints, load_data, open_data, seen_in_training, train_names
from mmrm_jax.eval.metrics import CellScores
from mmrm_jax.eval.running import Running, TableProgress, accuracies
from mmrm_jax.eval.stages import Build, Show, first_params, run_before
from mmrm_jax.files import alone, write_atomic
from mmrm_jax.objectives import find_objective
from mmrm_jax.tiny import MODEL_DIR, rate_note
from mmrm_jax.train.checkpoint import CheckpointError, check_config, write_config
from mmrm_jax.train.features import check_frozen_tower
from mmrm_jax.train.loop import resume, train
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.train.progress import make_progress, task
from mmrm_jax.train.setup import (
    Checkpoint,
    compile_ahead,
    describe_data,
    open_checkpoint,
    training_feed,
    training_steps,
)
from mmrm_jax.types import Quarantined

PATHS = ("model", "image_root")  # settings of a matrix that are a run's too
PROXY = "proxy"  # the branch of shortcut-aware training that is a text-only model
TEXT_MODELS = ("text_only", "shortcut_aware")  # objectives that train one, the first of them that is there
PROGRAMS = 8  # that stay compiled
# Settings that a finished cell does not depend on.
FREE = ("title", "seeds", "jobs", "out", *(f"train.{name}" for name in RESUMABLE))


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
    """What a run leaves behind: its evaluation on every test set, its history, its seconds of training, those of a run
    before it included, and the groups that it met and could not read."""

    cell: Cell
    evaluations: dict[str, Evaluation]
    history: list[dict[str, Any]]
    seconds: float
    unreadable: list[Quarantined]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """All runs of a configuration, with the data they were tested on; `seconds` are this command's own."""

    config: MatrixConfig
    data: Data
    results: list[CellResult]
    seconds: float


def trained_objectives(objectives: tuple[str, ...]) -> list[str]:
    """The objectives that need a run: beside shortcut_aware, text_only does not, since the proxy is that model.

    The proxy has its own parameters and loss, and no gradient from the primary. The two share one global-norm clip,
    as in the paper's recipe, so the proxy is text-only training up to clipping. Of a matrix's modifiers its loss has
    target margins alone: the others are of the branch that scores.
    """
    skip = {"text_only"} if "shortcut_aware" in objectives else set()
    return [o for o in objectives if o not in skip]


def as_trained(config: MatrixConfig, objective: str) -> str:
    """An objective with the matrix's modifiers, which its name in tables leaves out."""
    return "+".join((objective, *config.modifiers))


def check_matrix(config: MatrixConfig) -> None:
    """Raises ValueError for an unknown objective or modifier, and for several jobs that would share an accelerator."""
    for name in config.objectives:
        find_objective(as_trained(config, name))
    if config.jobs > 1 and jax.default_backend() != "cpu":
        raise ValueError(
            f"jobs is {config.jobs}, but each process would claim the same {jax.default_backend()}: use --jobs 1 "
            "(one process uses all devices), or JAX_PLATFORMS=cpu"
        )


def run_matrix(config: MatrixConfig, console: Console) -> Matrix:
    """Train and test every cell. A cell that an interrupted run has finished is read back, not trained again.

    With `config.jobs` above 1 the cells are shared out among processes. What is in `FREE` may differ from an earlier
    run in the same directory. Raises ValueError as `check_matrix` does, CheckpointError where the directory holds a
    matrix of another configuration, other data or another model, and InUse where another command is at work there.
    """
    check_matrix(config)
    with alone(config.out, ".lock", "is at work there"):
        return _run_matrix(config, console)


def _run_matrix(config: MatrixConfig, console: Console) -> Matrix:
    start = time.monotonic()
    model = config.model or MODEL_DIR
    checkpoint = open_checkpoint(model, config.train.data)
    check_frozen_tower(checkpoint.config, config.train)
    with keep_quarantine(refused_file(config.out)):
        sources = open_data(config)
        known: dict[Path, str] = {}
        resolved = to_json(config) | {"fingerprints": fingerprints(sources, model, known)}
        check_config(config.out, resolved, ignore=FREE)
        data = load_data(config, sources, checkpoint, console)
    for objective in trained_objectives(config.objectives):  # whose set-up may fail too
        trained = dataclasses.replace(config.train, objective=as_trained(config, objective))
        build_program(checkpoint.config, trained, 1)
    write_config(config.out, resolved)
    console.print(describe_data([*data.train.values(), *data.test.values()], data.buckets))
    for line in seen_in_training(sources, known):
        console.print(line, style="yellow", highlight=False)
    rate, option = config.train.optimizer.learning_rate, "--train.optimizer.learning-rate"
    if config.model is None and (note := rate_note(rate, option)):
        console.print(note, style="yellow")
    if data.quarantined:
        console.print(summarise_quarantine(data.quarantined))
    write_quarantine(config.out / "quarantine.jsonl", data.quarantined)
    cells = all_cells(config, list(data.train))
    write_settings(config, data, cells, resolved["fingerprints"])
    finished = [cell for cell in cells if is_finished(config.out, cell)]
    shares = share_out([cell for cell in cells if cell not in finished], config.jobs)
    shares[0] = finished + shares[0]  # which reads them for the display
    run_shares(config, checkpoint, data, shares, console)
    results = [read_cell(config.out / "cells" / cell.name, cell) for cell in cells]
    return Matrix(config, data, results, time.monotonic() - start)


def all_cells(config: MatrixConfig, trains: Sequence[str]) -> list[Cell]:
    """The runs of a matrix in the order of its results: by seed, objective and training environment."""
    objectives = trained_objectives(config.objectives)
    return [Cell(o, name, seed) for seed in range(config.seeds) for o in objectives for name in trains]


def is_finished(out: Path, cell: Cell) -> bool:
    """Whether a matrix in `out` has the results of a cell."""
    return (out / "cells" / cell.name / "cell.json").exists()


def cell_config(config: MatrixConfig, cell: Cell) -> TrainConfig:
    """The settings of one run."""
    objective, seed = as_trained(config, cell.objective), config.train.seed + cell.seed
    return dataclasses.replace(config.train, objective=objective, seed=seed)


def write_settings(config: MatrixConfig, data: Data, cells: Sequence[Cell], prints: dict[str, Any]) -> None:
    """Write a `config.json` like that of `mmrm train` for every cell, which is a run that `read_run` reads."""
    specs = {name: str(config.root / spec) for spec, name in train_names(config).items()}
    paths = {name: None if path is None else str(path) for name, path in vars(config).items() if name in PATHS}
    for cell in cells:
        settings = cell_config(config, cell)
        own = {"fingerprints": {"model": prints["model"], "train": prints["train"][cell.train]}, **paths}
        own |= {"trained_on": specs[cell.train], "total_steps": training_steps(settings, len(data.train[cell.train]))}
        write_config(config.out / "cells" / cell.name, to_json(settings) | own)


def share_out(cells: Sequence[Cell], jobs: int) -> list[list[Cell]]:
    """Cells for each of `jobs` processes, in parts of about equal cost: the costliest objective first, and one after
    another, so that its steps are compiled once, whatever seed and data, and by few of the processes.

    What a cell costs is its number of forward passes, those of the run before it included.
    """
    shares: list[list[Cell]] = [[] for _ in range(jobs)]
    cost = {cell.objective: forward_passes(cell.objective) for cell in cells}
    order = sorted(cost, key=lambda objective: -cost[objective])
    whole, before = sum(cost[cell.objective] for cell in cells), 0.0
    for cell in sorted(cells, key=lambda c: (order.index(c.objective), c.seed)):
        shares[int(before / whole * jobs)].append(cell)
        before += cost[cell.objective]
    return shares


def forward_passes(spec: str) -> float:
    """How many a step of an objective takes, with those of the run before it."""
    objective = find_objective(spec)
    own, before = len(objective.forwards()), objective.before
    return own if before is None else own + before.share * before.folds * forward_passes(before.objective)


def run_shares(
    config: MatrixConfig, checkpoint: Checkpoint, data: Data, shares: Sequence[Sequence[Cell]], console: Console
) -> None:
    """Run the first share here, the others each in a process; where anything goes wrong, these are ended at once."""
    others = [share for share in shares[1:] if share]
    if not others:
        return run_cells(config, checkpoint, data, shares[0], console)
    before = active_children()
    with ProcessPoolExecutor(len(others), get_context("spawn")) as pool:
        futures = [pool.submit(run_share, config, share) for share in others]
        workers = [process for process in active_children() if process not in before]

        def raise_failures() -> None:
            for future in futures:
                if future.done():
                    future.result()

        try:
            run_cells(config, checkpoint, data, shares[0], console, after_cell=raise_failures)
            for future in futures:
                future.result()
        except BaseException:  # an interrupt too
            for process in workers:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def run_share(config: MatrixConfig, cells: Sequence[Cell]) -> None:
    """What a process beside the first does: load the data itself and run its cells, silently, while that one lives."""
    end_with_parent()
    console = Console(quiet=True)
    checkpoint = open_checkpoint(config.model or MODEL_DIR, config.train.data)
    data = load_data(config, open_data(config), checkpoint, console)
    run_cells(config, checkpoint, data, cells, console)


def end_with_parent() -> None:
    """End this process at once where its parent is killed: nobody would wait for it, or know that it writes."""
    parent = parent_process()
    assert parent is not None, "only a process that another started has a parent"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cells(
    config: MatrixConfig,
    checkpoint: Checkpoint,
    data: Data,
    cells: Sequence[Cell],
    console: Console,
    after_cell: Callable[[], None] = lambda: None,
) -> None:
    """Run the cells that are not finished yet, with progress; compilations are shared where steps are equal.

    XLA maps every compiled loop into memory on its own, thousands of them a program, and Linux gives a process 65,530
    mappings: so a matrix of many objectives forgets the programs that it has not used for longest.
    """

    @functools.lru_cache(PROGRAMS)
    def program(objective: str, steps: int, comparisons: int) -> Program:
        settings = dataclasses.replace(config.train, objective=objective)
        return build_program(checkpoint.config, settings, steps, comparisons=comparisons)

    def build(settings: TrainConfig, steps: int, comparisons: int) -> Program:
        name = settings.objective
        return program(name, steps, comparisons if find_objective(name).remembers else 1)

    running = Running(console)
    with make_progress(console, TableProgress) as progress:
        progress.running = running
        overall = progress.add_task("matrix" if config.jobs == 1 else "share", total=len(cells), metrics="")
        for cell in cells:
            folder = config.out / "cells" / cell.name
            if not is_finished(config.out, cell):
                settings = cell_config(config, cell)
                steps = training_steps(settings, len(data.train[cell.train]))
                show = functools.partial(task, progress)
                write_cell(folder, run_cell(cell, build, checkpoint, data, settings, steps, folder, show))
            branch = find_objective(cell.objective).scores
            found = accuracies(read_cell(folder, cell).evaluations, branch, cell.train, data.iid)
            running.add(cell.objective, cell.name, found)
            progress.advance(overall)
            gc.collect()  # programs that are forgotten hold on to one another
            after_cell()


def run_cell(
    cell: Cell,
    build: Build,
    checkpoint: Checkpoint,
    data: Data,
    config: TrainConfig,
    steps: int,
    folder: Path,
    show: Show,
) -> CellResult:
    """Train one model, with the run before it where there is one, and evaluate it on every test set."""
    folder.mkdir(parents=True, exist_ok=True)
    quarantine = folder / "unreadable.jsonl"
    program = build(config, steps, data.train[cell.train].comparisons)
    state = resume(program, folder)
    if state is None and not (folder / "before").exists():
        quarantine.unlink(missing_ok=True)  # of a run that begins again
    left = run_before(
        program.objective.before,
        checkpoint,
        data.train[cell.train],
        data.buckets,
        config,
        steps,
        folder,
        quarantine=quarantine,
        build=build,
        show=lambda name, first: show(f"{cell.name}, {name}", first),
    )
    feed = training_feed(left.data, data.buckets, config, steps, program.mesh, quarantine=quarantine)
    compiling = 0.0
    if state is None:
        compiling = compile_ahead(program, feed)
        state = program.init(first_params(checkpoint, config.seed, program, left)[0], config)
    stream = feed.batches(int(state.step))
    with show(cell.name, steps) as report:
        result = train(program, state, stream, config, steps=steps, run_dir=folder, report=report, spent=compiling)
    evaluations = {
        name: evaluate(
            program,
            result.state,
            test,
            data.buckets,
            batch_size=config.eval_batch_size,
            quarantine=quarantine,
            strict=config.strict,
        )
        for name, test in data.test.items()
    }
    seconds = left.seconds + result.seconds
    return CellResult(cell, evaluations, result.history, seconds, read_quarantine(quarantine))


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
    write_atomic(folder / "cell.json", json.dumps(summary) + "\n")


def read_cell(folder: Path, cell: Cell) -> CellResult:
    """The result saved in `folder`. Raises CheckpointError where the cell is not finished."""
    if not (folder / "cell.json").exists():
        raise CheckpointError(f"{folder} holds no finished run: give the command again to run what is missing")
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
    unreadable = read_quarantine(folder / "unreadable.jsonl")
    return CellResult(cell, evaluations, summary["history"], summary["seconds"], unreadable)


def scores(matrix: Matrix) -> Iterator[CellScores]:
    """Every model on every test set, the text-only models included.

    The text-only model of an environment and seed comes from its own run or from the shortcut-aware run's proxy.
    """
    text = {
        (r.cell.train, r.cell.seed): r
        for objective in reversed(TEXT_MODELS)
        for r in matrix.results
        if r.cell.objective == objective
    }
    wanted = matrix.config.objectives
    numbers: dict[str, int] = {}  # one image has one number, whichever tests show it
    clusters = {test: image_clusters(source, numbers) for test, source in matrix.data.test.items()}
    for result in matrix.results:
        cell, own = result.cell, find_objective(result.cell.objective)
        shortcut = text.get((cell.train, cell.seed))
        for test, e in result.evaluations.items():
            common = {
                "train": cell.train,
                "test": test,
                "seed": cell.seed,
                "shortcut_margins": None if shortcut is None else shortcut.evaluations[test].margins[PROXY],
                "clusters": clusters[test][e.group],
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
