"""Sources -> a stream of batches, read through Grain.

Which groups make up which step is a pure function of (seed, step): a `BatchPlan`. So the position in the data is
one number, a run resumes exactly with any number of workers, every process reads its own share of each batch, and
a group that turns out to be unreadable leaves padding behind instead of shifting everything after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import numpy as np

from mmrm_jax.config import BranchInput
from mmrm_jax.data.batching import Buckets, EncodedGroup, GroupShape, collate, fit_buckets
from mmrm_jax.data.images import ImageError
from mmrm_jax.data.processor import Processor
from mmrm_jax.data.records import DataError, write_quarantine
from mmrm_jax.data.sources import GroupSource
from mmrm_jax.data.text import TextError
from mmrm_jax.types import Batch, Group, Quarantined

WINDOW = 16  # batches among which groups are sorted by length, to keep padding low


@dataclasses.dataclass(frozen=True)
class EncodedSource:
    """Groups that fit, as arrays. `kept` are their positions in `source`; `shapes` what they need of a batch."""

    source: GroupSource
    processor: Processor
    views: dict[str, BranchInput]
    kept: tuple[int, ...]
    shapes: tuple[GroupShape, ...]
    cache: dict[int, EncodedGroup] | None

    def __len__(self) -> int:
        return len(self.kept)

    def group(self, index: int) -> Group:
        """The raw group behind an encoded one."""
        return self.source[self.kept[index]]

    def encode(self, index: int) -> EncodedGroup | Quarantined:
        """The group at `index` as arrays, or why it cannot be used."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        group = self.group(index)
        try:
            encoded = self.processor.encode(group, index, self.views)
        except (ImageError, TextError) as error:
            return Quarantined(group.file, group.row, str(error), group.id)
        if self.cache is not None:
            self.cache[index] = encoded
        return encoded


def index_source(
    source: GroupSource,
    processor: Processor,
    views: dict[str, BranchInput],
    *,
    cache: bool,
    progress: Callable[[range], object] = lambda x: x,
) -> tuple[EncodedSource, list[Quarantined]]:
    """Measure every group of a source: text and image headers are read, pixels are not decoded.

    Groups over the token budget or with an unreadable image are returned as quarantined, with the reason.
    Raises DataError where no group is left.
    """
    kept, shapes, quarantined = [], [], []
    for i in progress(range(len(source))):  # type: ignore[union-attr]
        group = source[i]
        try:
            shapes.append(processor.measure(group, views))
            kept.append(i)
        except (ImageError, TextError) as error:
            quarantined.append(Quarantined(group.file, group.row, str(error), group.id))
    if not kept:
        first = f"; first reason: {quarantined[0].reason}" if quarantined else ""
        raise DataError(f"no usable group among {len(source)}{first}")
    encoded = EncodedSource(source, processor, views, tuple(kept), tuple(shapes), {} if cache else None)
    return encoded, quarantined


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Step -> positions of its groups: epochs shuffled by (seed, epoch), then sorted by length within windows.

    `lengths` are the groups' longest responses. Steps run on across epochs, so no group is left out.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> np.ndarray:
        window, within = divmod(step, WINDOW)
        start = window * WINDOW * self.batch_size
        positions = self._stream(start, WINDOW * self.batch_size)
        order = np.argsort(np.asarray(self.lengths)[positions], kind="stable")
        shuffled = np.random.default_rng([self.seed, 1, window]).permutation(WINDOW)
        return positions[order].reshape(WINDOW, self.batch_size)[shuffled[within]]

    def _stream(self, start: int, count: int) -> np.ndarray:
        n = len(self.lengths)
        parts = []
        for epoch in range(start // n, (start + count - 1) // n + 1):
            shuffled = np.random.default_rng([self.seed, 0, epoch]).permutation(n)
            parts.append(shuffled[max(0, start - epoch * n) : max(0, start + count - epoch * n)])
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class SequentialPlan:
    """Every group once, in order; the last batch may be short."""

    size: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __getitem__(self, step: int) -> np.ndarray:
        return np.arange(step * self.batch_size, min(self.size, (step + 1) * self.batch_size))


@dataclasses.dataclass(frozen=True)
class MakeBatch:
    """Positions -> padded batch: the step of the pipeline that workers run.

    Every process takes its slice of the batch. What cannot be read is appended to `quarantine`.
    """

    data: EncodedSource
    buckets: Buckets
    batch_size: int
    micro_batches: int = 1
    quarantine: Path | None = None
    strict: bool = False
    process_index: int = 0
    process_count: int = 1

    def __call__(self, positions: np.ndarray) -> Batch:
        mine = positions[self.process_index :: self.process_count]
        encoded = [self.data.encode(int(p)) for p in mine]
        groups = [e for e in encoded if isinstance(e, EncodedGroup)]
        bad = [e for e in encoded if isinstance(e, Quarantined)]
        if bad and self.strict:
            raise DataError(f"{bad[0].file}: row {bad[0].row}: {bad[0].reason} (--train.strict stops at the first)")
        if bad and self.quarantine is not None:
            write_quarantine(self.quarantine, bad)
        local = self.batch_size // self.process_count
        return collate(
            groups, self.buckets, num_groups=local, micro_batches=self.micro_batches, views=self.data.views
        )


def buckets_for(datasets: Sequence[EncodedSource], k: int) -> Buckets:
    """Buckets that cover several data sets, so that all of them share one set of compilations."""
    shapes = [s for d in datasets for s in d.shapes]
    return fit_buckets(shapes, k, datasets[0].processor.preprocessing.image_size)


def batches(plan: BatchPlan | SequentialPlan, make: MakeBatch, *, workers: int = 0) -> grain.IterDataset:
    """The stream of batches of a plan; its iterator's state is checkpointable (`get_state`/`set_state`)."""
    stream = grain.MapDataset.source(plan).map(make).to_iter_dataset(grain.ReadOptions(num_threads=1))
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return stream
