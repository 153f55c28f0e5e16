"""One run: train on one data set, evaluate on another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mmrm_jax.config import RESUMABLE, TrainConfig, to_json
from mmrm_jax.data.buckets import Buckets
from mmrm_jax.data.pipeline import EncodedSource, buckets_for
from mmrm_jax.data.quarantine import clear_quarantine, keep_quarantine, merge_quarantine, refused_file
from mmrm_jax.data.records import DataError, raise_first, summarise_quarantine, write_quarantine
from mmrm_jax.data.sources import GroupSource, fingerprint
from mmrm_jax.distributed import is_main
from mmrm_jax.eval.evaluate import Evaluation, evaluate, image_clusters
from mmrm_jax.eval.metrics import CellScores, cell_row
from mmrm_jax.eval.profile import profiled
from mmrm_jax.eval.saved_run import read_run
from mmrm_jax.eval.single_tables import training_table
from mmrm_jax.eval.stages import Left, first_params, run_before
from mmrm_jax.eval.summary import between, percent
from mmrm_jax.files import alone
from mmrm_jax.objectives import find_objective
from mmrm_jax.tiny import MODEL_DIR, rate_note
from mmrm_jax.train.checkpoint import check_config, write_config
from mmrm_jax.train.features import check_frozen_tower, with_features
from mmrm_jax.train.loop import resume, train
from mmrm_jax.train.preemption import handled
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.train.progress import make_progress, task
from mmrm_jax.train.setup import (
    Checkpoint,
    compile_ahead,
    describe_data,
    encode,
    merged_views,
    model_fingerprint,
    open_checkpoint,
    open_spec,
    require_comparisons,
    training_feed,
    training_sources,
    training_steps,
)
from mmrm_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a run is trained on: the checkpoint it starts from, its data and the held-out part, encoded.

    `settings` is what its `config.json` is to hold.
    """

    checkpoint: Checkpoint
    train: EncodedSource
    validation: EncodedSource | None
    buckets: Buckets
    settings: dict[str, Any]


def open_run(
    config: TrainConfig, spec: str, out: Path, model: Path | None, image_root: Path | None, console: Console
) -> Opened:
    """Open the model and the data of a run; report what cannot be used.

    Raises CheckpointError where `out` holds a run of another configuration.
    """
    paths = {"model": str(model) if model else None, "image_root": str(image_root) if image_root else None}
    checkpoint = open_checkpoint(model or MODEL_DIR, config.data)
    check_frozen_tower(checkpoint.config, config)
    views = merged_views([find_objective(config.objective)], config)
    source, held_out, quarantined = training_sources(spec, Path(), image_root, config)
    prints = _fingerprints(source, held_out, checkpoint.path)
    resolved = to_json(config) | {"trained_on": spec, **paths, "fingerprints": prints}
    total = {"total_steps"}  # which follows from the rest
    changed = check_config(out, resolved, ignore=(*total, *RESUMABLE))
    for line in changed:
        if line.partition(":")[0] not in total:
            console.print(f"changed since the run began: {line}")
    data, bad = encode(source, checkpoint, views, config, name=spec, console=console, join=config.data.join)
    quarantined += bad
    require_comparisons(data, spec, quarantined)
    validation = None
    if held_out is not None:
        name = f"{spec}, held out"
        validation, bad = encode(held_out, checkpoint, views, config, name=name, console=console)
        quarantined += bad
        require_comparisons(validation, name, quarantined)
    if quarantined:
        console.print(summarise_quarantine(quarantined))
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_quarantine(out / "quarantine.jsonl", quarantined)
    data, *rest = with_features([data] if validation is None else [data, validation], checkpoint, config, console)
    validation = rest[0] if rest else None
    sets = [data, *rest]
    buckets = buckets_for(sets, config.data.buckets)
    console.print(describe_data(sets, buckets))
    settings = resolved | {"total_steps": training_steps(config, len(data))}
    return Opened(checkpoint, data, validation, buckets, settings)


def train_run(
    config: TrainConfig,
    spec: str,
    out: Path,
    model: Path | None,
    image_root: Path | None,
    console: Console,
    *,
    go_on: bool = True,
    profile: bool = False,
) -> dict[str, Any]:
    """Train, evaluating on the held-out part; goes on from the last checkpoint in `out` that is whole, if there is one.

    Without `go_on` it begins again, and replaces what lies there once it trains. With `profile` it says what the time
    went on, and leaves that in `out/profile`. Of several processes each reads its share of every batch, and `out` is a
    folder that all of them see. Raises CheckpointError where `out` holds a run of another configuration, InUse where
    another command is training there, and Preempted where a signal stopped it.
    """
    with alone(out, ".lock", "is training there"):
        with keep_quarantine(refused_file(out)):
            run = open_run(config, spec, out, model, image_root, console)
        return _train(run, config, spec, out, model, console, go_on=go_on, profile=profile)


def _train(
    run: Opened,
    config: TrainConfig,
    spec: str,
    out: Path,
    model: Path | None,
    console: Console,
    *,
    go_on: bool,
    profile: bool,
) -> dict[str, Any]:
    if model is None and (note := rate_note(config.optimizer.learning_rate, "--optimizer.learning-rate")):
        console.print(note, style="yellow")
    steps = training_steps(config, len(run.train))

    def build(settings: TrainConfig, steps: int, comparisons: int) -> Program:
        return build_program(run.checkpoint.config, settings, steps, comparisons=comparisons)

    program = build(config, steps, run.train.comparisons)
    unreadable = out / "unreadable.jsonl"
    state = resume(program, out, lambda message: console.print(message, style="yellow")) if go_on else None
    if state is None and not (go_on and (out / "before").exists()):
        clear_quarantine(unreadable)  # of a run that begins again
    write_config(out, run.settings)
    with handled(program.mesh) as stop:
        with make_progress(console) as bar:
            left = run_before(
                program.objective.before,
                run.checkpoint,
                run.train,
                run.buckets,
                config,
                steps,
                out,
                quarantine=unreadable,
                build=build,
                show=functools.partial(task, bar, lines=True),
                go_on=go_on,
                stop=stop,
            )
        feed = training_feed(left.data, run.buckets, config, steps, program.mesh, quarantine=unreadable)
        compiling = 0.0
        if state is None and not profile:  # a profile counts what is compiled in its steps
            with console.status("compiling the train step"):
                compiling = compile_ahead(program, feed)
        state = _first_state(run, program, config, state, left, console)
        folder, stream = out / "profile" if profile else None, feed.batches(int(state.step))
        with (
            profiled(program, stream, run.checkpoint.config, config, folder) as recorded,
            make_progress(console) as bar,
            task(bar, config.objective, steps, start=int(state.step), keep=True, lines=True) as report,
        ):
            result = train(
                recorded.program,
                state,
                recorded.stream,
                config,
                steps=steps,
                run_dir=out,
                report=report,
                evaluate=_validation(run, program, config, spec, unreadable),
                stop=stop,
                describe=run.train.describe,
                spent=compiling,
            )
    final = {k: v for k, v in result.history[-1].items() if isinstance(v, float)} if result.history else {}
    if result.history:
        console.print(training_table(program.objective, result.history))
    found = merge_quarantine(unreadable)
    if found:
        console.print(f"unreadable while running, left out:\n{summarise_quarantine(found)}")
    another = shlex.join(("mmrm", "evaluate", "--run", str(out), "--data"))
    console.print(f"the run is in {out}; test it: {another} FILE", soft_wrap=True, highlight=False)
    return {
        "out": str(out),
        "steps": steps,
        "seconds": result.seconds,
        "final": final,
        "unreadable": [dataclasses.asdict(q) for q in found],
    } | ({"profile": recorded.report(console)} if profile and is_main() else {})


def _first_state(
    run: Opened, program: Program, config: TrainConfig, found: TrainState | None, left: Left, console: Console
) -> TrainState:
    """The state that was `found` in a checkpoint, or that of step 0."""
    if found is not None:
        done = int(found.step) >= training_steps(config, len(run.train))
        console.print(f"{'finished before, at' if done else 'going on from'} step {int(found.step)}")
        return found
    params, drawn = first_params(run.checkpoint, config.seed, program, left)
    if drawn:
        console.print(f"not in the checkpoint, drawn from seed {config.seed}: {', '.join(drawn)}")
    return program.init(params, config)


def _validation(
    run: Opened, program: Program, config: TrainConfig, spec: str, unreadable: Path
) -> Callable[[TrainState], dict[str, float | None]]:
    """What is measured on the held-out part, if there is one."""
    validation = run.validation
    if validation is None:
        return lambda state: {}
    clusters = image_clusters(validation)

    def validate(state: TrainState) -> dict[str, float | None]:
        e = evaluate(
            program,
            state,
            validation,
            run.buckets,
            batch_size=config.eval_batch_size,
            quarantine=unreadable,
            strict=config.strict,
        )
        row = cell_row(_scores(e, program, spec, "held out", config.seed, clusters), np.random.default_rng(0))
        return {f"validation/{k}": v for k, v in row.items() if v is None or isinstance(v, float) or k == "n"}

    return validate


def _fingerprints(source: GroupSource, held_out: GroupSource | None, model: Path) -> dict[str, str]:
    """What the numbers come from beside the settings: hashes of the weights and of the data."""
    known: dict[Path, str] = {}
    prints = {"model": model_fingerprint(model), "train": fingerprint(source, known)}
    return prints if held_out is None else prints | {"held_out": fingerprint(held_out, known)}


def _scores(
    e: Evaluation, program: Program, train_name: str, test_name: str, seed: int, clusters: np.ndarray
) -> CellScores:
    own = program.objective
    return CellScores(
        objective=own.name,
        train=train_name,
        test=test_name,
        seed=seed,
        margins=e.margins[own.scores],
        shortcut_margins=e.margins.get("proxy"),
        clusters=clusters[e.group],
        tie=e.tie,
        mean_reward=e.mean_reward[own.scores],
        sfc=e.sfc,
    )


def evaluate_run(
    run: Path, spec: str, image_root: Path | None, console: Console, chosen: int | None = None
) -> dict[str, Any]:
    """Evaluate a run's last checkpoint, or that of step `chosen`, on a data set.

    Raises CheckpointError where `run` holds none, as `read_run`.
    """
    saved = read_run(run)
    config, checkpoint, program = saved.config, saved.checkpoint, saved.program
    views = merged_views([find_objective(config.objective)], config)
    quarantine = run / quarantine_name(spec)
    with keep_quarantine(quarantine):
        source, quarantined = open_spec(spec, Path(), image_root)
        data, bad = encode(source, checkpoint, views, config, name=spec, console=console)
        quarantined += bad
        if config.strict:
            raise_first(quarantined)
        require_comparisons(data, spec, quarantined)
    clear_quarantine(quarantine)
    if is_main():
        write_quarantine(quarantine, quarantined)  # the evaluation adds what it cannot read
    (data,) = with_features([data], checkpoint, config, console)
    state, step = saved.restore(console, chosen)
    buckets = buckets_for([data], config.data.buckets)
    console.print(describe_data([data], buckets))
    e = evaluate(
        program,
        state,
        data,
        buckets,
        batch_size=config.eval_batch_size,
        quarantine=quarantine,
        strict=config.strict,
    )
    quarantined = merge_quarantine(quarantine)
    if not len(e.margins[program.objective.scores]):
        raise DataError(f"{spec} has no comparisons left to evaluate; what was left out, and why: {quarantine}")
    row = cell_row(_scores(e, program, saved.data, spec, config.seed, image_clusters(data)), np.random.default_rng(0))
    if e.sfc is not None:
        # Twice a product of two coefficients, as an objective may weigh by, can be above 1.
        counts, edges = np.histogram(np.clip(e.sfc[~e.tie], 0.0, 1.0), bins=20, range=(0.0, 1.0))
        row["sfc_histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
    _print(row, console)
    if quarantined:
        console.print(f"{summarise_quarantine(quarantined)}\nall of them: {quarantine}")
    unusable = [dataclasses.asdict(q) for q in quarantined]
    return {"row": row, "quarantined": unusable, "step": step, "steps": saved.steps, "finished": step >= saved.steps}


def quarantine_name(spec: str) -> str:
    """The file for what an evaluation could not use: what the data set is called, and a digest of where it lies."""
    name = Path(spec).name
    called = re.sub(r"[^\w.-]+", "-", name if ":" in name else Path(spec).stem).strip("-")
    return f"quarantine-{called}-{hashlib.sha256(str(Path(spec).resolve()).encode()).hexdigest()[:8]}.jsonl"


def _print(row: dict[str, Any], console: Console) -> None:
    interval = between(row["accuracy_low"], row["accuracy_high"], percent)
    bounds = f" (95 % interval {interval})" if interval else " (too few images for an interval)" if row["n"] else ""
    console.print(f"accuracy {percent(row['accuracy'])} %{bounds}, n = {row['n']}")
    if row["n_shortcut_right"] is None:
        console.print("SFD needs the text-only proxy of shortcut_aware training; this run has none")
    elif row["sfd"] is None:
        right, wrong = row["n_shortcut_right"], row["n_shortcut_wrong"]
        console.print(f"SFD is undefined: the text-only model is right on {right} comparisons and wrong on {wrong}")
    else:
        right, wrong = 100 * row["accuracy_shortcut_right"], 100 * row["accuracy_shortcut_wrong"]
        found = between(row["sfd_low"], row["sfd_high"], percent)
        console.print(
            f"SFD {100 * row['sfd']:.1f} points{f' (95 % interval {found})' if found else ''}: {right:.1f} % where the "
            f"text-only model is right (n = {row['n_shortcut_right']}), {wrong:.1f} % where it is wrong "
            f"(n = {row['n_shortcut_wrong']})"
        )
    if row["mean_margin"] is None:  # nothing but ties
        return
    console.print(f"mean reward {row['mean_reward']:.3f}, mean margin {row['mean_margin']:.3f}")
    if "sfc_histogram" in row:
        console.print(f"mean SFC {row['sfc_mean']:.3f}; histogram in 20 bins: {row['sfc_histogram']['counts']}")
