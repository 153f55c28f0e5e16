"""From paths in a configuration to a model, a processor and encoded data: shared by every command."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from mmrm_jax.config import BranchInput, DataConfig, ModelConfig, TrainConfig
from mmrm_jax.data.buckets import Buckets
from mmrm_jax.data.folder import read_optional, why
from mmrm_jax.data.join import join_rows
from mmrm_jax.data.pipeline import NO_AUGMENTATION, BatchPlan, EncodedSource, MakeBatch, batches, index_source
from mmrm_jax.data.processor import SAVED, Processor
from mmrm_jax.data.records import DataError, raise_first
from mmrm_jax.data.sources import ChainSource, GroupSource, open_source, split_holdout
from mmrm_jax.data.tokenizer import TOKENIZER_FILES
from mmrm_jax.distributed import own_file, require_agreement
from mmrm_jax.models.hf.config import read_config
from mmrm_jax.models.hf.tensors import weight_files
from mmrm_jax.models.hf.weights import load_params
from mmrm_jax.objectives import Objective, find_objective
from mmrm_jax.sharding import batch_share
from mmrm_jax.train.program import Program
from mmrm_jax.train.state import abstract_model, init_score, place_abstract
from mmrm_jax.types import Batch, Quarantined

# What decides beside weights and tokenizer what a checkpoint computes.
SETTINGS_FILES = (
    "config.json",
    SAVED,
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model folder in the Hugging Face layout, opened: its configuration and its processor."""

    path: Path
    config: ModelConfig
    processor: Processor


def open_checkpoint(path: Path, data: DataConfig | None = None) -> Checkpoint:
    """A checkpoint as it was saved, or with the token budget and the tiling of `data`.

    Raises ValueError naming what is missing or unsupported, and what of its tokenizer and images the model cannot take.
    """
    config = read_model(path)
    limits = {} if data is None else {"max_length": data.max_length, "max_tiles": data.max_tiles}
    processor = Processor.from_pretrained(path, config.visual_tokens_per_tile, **limits)
    if problems := processor_problems(processor, config):
        raise ValueError(f"{path}: " + "; ".join(problems))
    # How values are normalised is written beside the tiling, and applied in the model.
    images = processor.preprocessing
    vision = dataclasses.replace(config.vision, mean=images.mean, std=images.std)
    return Checkpoint(path, dataclasses.replace(config, vision=vision), processor)


def read_model(path: Path) -> ModelConfig:
    """`read_config` of a checkpoint folder, which says so where `path` is a directory of `mmrm train` instead."""
    if "trained_on" in read_optional(path / "config.json"):
        raise ValueError(
            f"{path} is a run directory of mmrm train, no checkpoint folder: `mmrm export --run {path} --out FOLDER` "
            "makes one of it"
        )
    return read_config(path)


def processor_problems(processor: Processor, config: ModelConfig) -> list[str]:
    """Where a checkpoint's tokenizer and preprocessing do not fit its model."""
    problems = []
    largest, rows = max(processor.chat.tokenizer.get_vocab().values()), config.decoder.vocab_size
    if largest >= rows:
        problems.append(
            f"the tokenizer has ids up to {largest}, but vocab_size in config.json is {rows}: give the folder the "
            "tokenizer that the model was trained with, or enlarge the embedding"
        )
    tile, side = processor.preprocessing.image_size, config.vision.image_size
    if tile != side:
        problems.append(f"images are cut into tiles of {tile} pixels, but image_size in config.json is {side}")
    return problems


def model_fingerprint(path: Path) -> str:
    """SHA-256 of all that decides what a checkpoint folder computes: weights, configuration, tokenizer, preprocessing.

    Raises ValueError where there are no weights, or a file cannot be read.
    """
    digest = hashlib.sha256()
    settings = [path / name for name in (*SETTINGS_FILES, *TOKENIZER_FILES) if (path / name).exists()]
    for file in (*weight_files(path), *settings):
        digest.update(f"\n{file.name}\n".encode())
        try:
            with file.open("rb") as f:
                while block := f.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {why(error)}") from error
    return digest.hexdigest()


def initial_params(checkpoint: Checkpoint, seed: int, mesh: Mesh | None = None) -> tuple[nnx.State, list[str]]:
    """Pretrained parameters; what the checkpoint lacks (the score head) is drawn from `seed` and named.

    With a mesh every device reads its own part; without one they are put on the default device.
    """
    like = abstract_model(checkpoint.config)[1]
    if mesh is not None:
        like = place_abstract(like, mesh)
    like["score"] = init_score(checkpoint.config, seed)
    return load_params(checkpoint.path, checkpoint.config, like)


def open_spec(spec: str, root: Path, image_root: Path | None) -> tuple[GroupSource, list[Quarantined]]:
    """Open `FILE` or `DIRECTORY:SPLIT`, relative to `root`, or several of them joined by "+", one after another."""
    if "+" in spec and not any((root / path).exists() for path in _meant(spec)):
        opened = [open_spec(part, root, image_root) for part in spec.split("+")]
        sources, quarantined = zip(*opened, strict=True)
        return ChainSource(sources), [row for rows in quarantined for row in rows]
    folder, colon, split = Path(spec).name.partition(":")  # the first colon: a TFDS slice may hold another
    if colon:
        return open_source(root / Path(spec).parent / folder, split or None)
    return open_source(root / spec, image_root=image_root)


def _meant(spec: str) -> Iterator[Path]:
    """What a spec may name with a "+" in it: a path, the DIRECTORY of a SPLIT, the FILE of a FORMAT."""
    path = Path(spec)
    yield path
    yield from (path.with_name(name) for name in (path.name.partition(":")[0], path.name.rpartition("@")[0]) if name)


def training_sources(
    spec: str, root: Path, image_root: Path | None, config: TrainConfig
) -> tuple[GroupSource, GroupSource | None, list[Quarantined]]:
    """(training part, held-out part or None, quarantined rows) of a training file, split by image."""
    source, quarantined = open_spec(spec, root, image_root)
    require_agreement([len(source), [[entry.file, entry.row] for entry in quarantined]], f"rows of {spec}")
    if config.strict:
        raise_first(quarantined)
    if not config.data.holdout:
        return source, None, quarantined
    train, held_out = split_holdout(source, config.data.holdout, config.data.holdout_seed)
    return train, held_out, quarantined


def training_steps(config: TrainConfig, groups: int) -> int:
    """`steps`, or as many as `epochs` passes over the groups take; the last batch is filled from the next pass."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(round(config.epochs * groups / config.batch_size, 6)))


@dataclasses.dataclass(frozen=True)
class Feed:
    """What a run trains on: which groups each step takes, and what makes this process's share of their batch."""

    plan: BatchPlan
    make: MakeBatch
    config: TrainConfig

    def batches(self, start: int) -> Iterable[Batch]:
        """Those of steps `start`, `start` + 1, ... up to the last."""
        workers = self.config.data.workers
        if self.config.data.augment == NO_AUGMENTATION:
            return batches(self.plan, self.make, start=start, workers=workers)
        return batches(self.plan, self.make.random, start=start, workers=workers, seed=self.config.seed)


def training_feed(
    data: EncodedSource,
    buckets: Buckets,
    config: TrainConfig,
    steps: int,
    mesh: Mesh,
    *,
    quarantine: Path,
    only: np.ndarray | None = None,
) -> Feed:
    """The feed of a run of so many steps.

    What cannot be read is added to this process's own file in place of `quarantine`. With `only` these groups are
    trained on, and no others.

    Groups are brought together by their bucket, not by their length: where few texts make up a data set, the exact
    length would give batches of one and the same text.
    """
    objective = find_objective(config.objective)
    data = _with_environments(data, objective)
    data = data.with_numbers() if objective.remembers else data
    shapes = data.shapes if only is None else [data.shapes[i] for i in only]
    plan = BatchPlan(list(map(buckets.of, shapes)), config.batch_size, config.seed, steps, only)
    index, count = batch_share(mesh)
    make = MakeBatch(
        data,
        buckets,
        config.batch_size,
        config.micro_batches,
        quarantine=own_file(quarantine),
        strict=config.strict,
        share=index,
        shares=count,
        augmentation=config.data.augment,
    )
    return Feed(plan, make, config)


def compile_ahead(program: Program, feed: Feed) -> float:
    """Compile the train step for a batch of every mix of buckets; returns the seconds that it took.

    To be called before there is a state: the compiler needs as much memory as the state of a small model. What it made
    is found again when a batch of that size comes; mixed buckets may have batches of another size, compiled then.
    """
    start = time.monotonic()
    for positions in feed.plan.of_each_mix():
        program.lower_train_step(program.abstract, program.put(feed.make.padding(positions))).compile()
    return time.monotonic() - start


def _with_environments(data: EncodedSource, objective: Objective) -> EncodedSource:
    """The data with the environment of each comparison, where the objective reads it.

    Raises ValueError where there are more of them than it tells apart, or all comparisons are of one.
    """
    if not objective.environments:
        return data
    names = data.environments()
    if (count := len(set(names))) > objective.environments:
        known = ", ".join(sorted(set(names)))
        raise ValueError(
            f"{objective.name} tells {objective.environments} environments apart, and there are {count}: {known}"
        )
    if count == 1:
        raise ValueError(
            f"{objective.name} compares environments, and all comparisons are of one, {names[0]!r}: environments go by "
            "their files' names without folder and ending; train on files of different names, one.jsonl+two.jsonl"
        )
    return data.with_environments(names)


def describe_data(sets: Sequence[EncodedSource], buckets: Buckets) -> str:
    """How much there is, and how many compilations it can take: one for each size that batches are padded to."""
    shapes = [shape for each in sets for shape in each.shapes]
    found = f"{len(shapes)} groups in {len(sets)} set{'s' if len(sets) > 1 else ''}"
    sizes = "one size, and each step is compiled once"
    if len(buckets.shapes) > 1:
        sizes = f"at most {len(buckets.shapes)} sizes, and each step is compiled once for each"
    return f"{found}; batches are padded to {sizes}; {buckets.padding(shapes):.0%} of tokens are padding"


def merged_views(objectives: Iterable[Objective], config: TrainConfig) -> dict[str, BranchInput]:
    """What every forward pass of several objectives sees, and of the runs before them: their data is encoded once.

    Raises ValueError where two of them mean different inputs by one name.
    """
    views: dict[str, BranchInput] = {}
    for objective in (each for one in objectives for each in with_before(one)):
        for name, view in objective.inputs(config.proxy_input).items():
            if views.setdefault(name, view) != view:
                raise ValueError(f"{objective.name} has {name} see {view}, others {views[name]}: run it on its own")
    return views


def with_before(objective: Objective) -> list[Objective]:
    """The objective and that of the run before it, if there is one."""
    return [objective] if objective.before is None else [objective, find_objective(objective.before.objective)]


def encode(
    source: GroupSource,
    checkpoint: Checkpoint,
    views: dict[str, BranchInput],
    config: TrainConfig,
    *,
    name: str,
    console: Console,
    join: int = 1,
) -> tuple[EncodedSource, list[Quarantined]]:
    """Measure a source with a progress bar, and make up to `join` rows of one image and prompt one group.

    A group without a comparison is quarantined. In strict mode the first unusable group raises DataError.
    """

    def progress(indices: range) -> Any:
        said = escape(f"reading {name}")
        return track(indices, said, console=console, transient=True, disable=not console.is_terminal)

    data, quarantined = index_source(source, checkpoint.processor, views, cache=config.data.cache, progress=progress)
    data, uncompared = _compared(data)
    quarantined += uncompared
    if config.strict:
        raise_first(quarantined)
    return (data if join == 1 else join_rows(data, join)), quarantined


def _compared(data: EncodedSource) -> tuple[EncodedSource, list[Quarantined]]:
    """The groups with comparisons, and the others as quarantined."""
    compared = [i for i, shape in enumerate(data.shapes) if shape.comparisons]
    if len(compared) == len(data):
        return data, []
    reason = "no comparison: it has responses and no preference among them, as for `mmrm score`"
    others = (data.group(i) for i, shape in enumerate(data.shapes) if not shape.comparisons)
    return data.only(compared), [Quarantined(group.file, group.row, reason, group.id) for group in others]


def require_comparisons(data: EncodedSource, name: str, quarantined: Sequence[Quarantined]) -> None:
    """Raises DataError where there is nothing to train on or to evaluate; `quarantined` is what was left out of it."""
    if len(data):
        return
    reason = f"; first reason: {quarantined[0].reason}" if quarantined else ""
    raise DataError(
        f"{name} has no comparisons: training and evaluation need rows with a preference{reason}", quarantined
    )
