"""The run that an objective asks for before its own: trained, and what it leaves to the run that follows."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from flax import nnx

from mmrm_jax.config import TrainConfig
from mmrm_jax.data.buckets import Buckets
from mmrm_jax.data.pipeline import EncodedSource
from mmrm_jax.eval.evaluate import Evaluation, evaluate, image_clusters
from mmrm_jax.models.lora import fold_adapters
from mmrm_jax.objectives import Before
from mmrm_jax.train.loop import Report, resume, train
from mmrm_jax.train.preemption import Preempted
from mmrm_jax.train.program import Program
from mmrm_jax.train.setup import Checkpoint, compile_ahead, initial_params, training_feed
from mmrm_jax.train.state import merge_branch

# (settings, steps, comparisons of its data) -> the program of a run
Build = Callable[[TrainConfig, int, int], Program]
# (name, steps) -> the display of a run's progress
Show = Callable[[str, int], AbstractContextManager[Report]]
Stop = Callable[[], signal.Signals | None]


@dataclasses.dataclass(frozen=True)
class Left:
    """What comes of the run before: the data with margins in `given`, parameters to start from, seconds of training."""

    data: EncodedSource
    params: nnx.State | None
    seconds: float


def run_before(
    before: Before | None,
    checkpoint: Checkpoint,
    data: EncodedSource,
    buckets: Buckets,
    config: TrainConfig,
    steps: int,
    folder: Path,
    *,
    quarantine: Path,
    build: Build,
    show: Show,
    go_on: bool = True,
    stop: Stop = lambda: None,
) -> Left:
    """Train as `before` says, in `folder/before`, or with `go_on` go on with what an interrupted command left there.

    `steps` are those of the run that follows; `quarantine` and `stop` are as in `train.setup.training_feed` and
    `train.loop.train`. Margins are those of the trained model on the data it was trained on, or, with folds, on the
    images that it was not trained on. None is nothing before: the data as they are, and the checkpoint's parameters.
    """
    if before is None:
        return Left(data, None, 0.0)
    first = max(1, round(before.share * steps))
    settings = dataclasses.replace(config, objective=before.objective, steps=first, eval_every=None, keep_best=0)
    program = build(settings, first, data.comparisons)
    clusters = image_clusters(data)
    images = clusters.max() + 1
    if images < before.folds:
        raise ValueError(f"{config.objective} takes {before.folds} parts of the images, and the data have {images}")
    fold = np.random.default_rng(config.seed).permutation(images)[clusters] % before.folds
    found: list[Evaluation] = []
    params, seconds = None, 0.0
    for k in range(before.folds):
        whole = before.folds == 1
        with show(f"before: {before.objective}" + ("" if whole else f", part {k + 1}"), first) as report:
            place = folder / "before" / str(k)
            place.mkdir(parents=True, exist_ok=True)
            state = resume(program, place) if go_on else None
            only = None if whole else np.flatnonzero(fold != k)
            feed = training_feed(data, buckets, settings, first, program.mesh, quarantine=quarantine, only=only)
            compiling = 0.0
            if state is None:
                compiling = compile_ahead(program, feed)
                state = program.init(initial_params(checkpoint, settings.seed, program.mesh)[0], settings)
            result = train(
                program,
                state,
                feed.batches(int(state.step)),
                settings,
                spent=compiling,
                steps=first,
                run_dir=place,
                report=report,
                stop=stop,
                describe=data.describe,
            )
        seconds += result.seconds
        if before.start is not None:
            params = fold_adapters(merge_branch(result.state.params[before.start], result.state.frozen))
        if before.given:
            own = None if whole else np.flatnonzero(fold == k)
            found.append(evaluate(program, result.state, data, buckets, batch_size=config.eval_batch_size, only=own))
        if received := stop() or stop():  # of several processes the first answer is that of before the evaluation
            raise Preempted(first, received)
    return Left(with_margins(data, before.given, found) if found else data, params, seconds)


def with_margins(data: EncodedSource, branches: tuple[str, ...], found: list[Evaluation]) -> EncodedSource:
    """`data` with the margins of evaluations that together cover it; 0 for groups that could not be read."""
    given = {}
    for branch in branches:
        values = [np.zeros(shape.comparisons, np.float32) for shape in data.shapes]
        for e in found:
            if not len(e.group):  # none of its groups could be read
                continue
            starts = np.flatnonzero(np.diff(e.group, prepend=-1))
            for start, margins in zip(starts, np.split(e.margins[branch], starts[1:]), strict=True):
                values[e.group[start]] = margins
        given[branch] = values
    return dataclasses.replace(data, given=given)


def first_params(checkpoint: Checkpoint, seed: int, program: Program, left: Left | None) -> tuple[nnx.State, list[str]]:
    """Parameters that a run starts from, and the names of those that were drawn."""
    if left is not None and left.params is not None:
        return left.params, []
    return initial_params(checkpoint, seed, program.mesh)
