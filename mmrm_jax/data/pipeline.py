"""Sources -> a stream of batches, read through Grain.

Which groups make up which step is a pure function of (seed, step): a `BatchPlan`. So the position in the data is
one number, a run resumes exactly with any number of workers, every process reads its own share of each batch, and
a group that turns out to be unreadable leaves padding behind instead of shifting everything after it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from absl import flags

from mmrm_jax.config import Augmentation, BranchInput
from mmrm_jax.data.augment import augment
from mmrm_jax.data.batching import EncodedGroup, collate
from mmrm_jax.data.buckets import Buckets, GroupShape, fit_buckets
from mmrm_jax.data.features import SourceFeatures
from mmrm_jax.data.images import ImageError
from mmrm_jax.data.processor import Change, Processor, joined, unchanged
from mmrm_jax.data.records import raise_first
from mmrm_jax.data.sources import GroupSource
from mmrm_jax.data.text import TextError
from mmrm_jax.distributed import divided
from mmrm_jax.types import ENVIRONMENT, NUMBER, Batch, Group, Quarantined

T = TypeVar("T")

NO_AUGMENTATION = Augmentation()

# Grain reads 500 elements ahead by default, and an element is a whole batch here.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


@dataclasses.dataclass(frozen=True)
class EncodedSource:
    """Groups that fit, as arrays. `kept` are their positions in `source`; `shapes` what they need of a batch.

    With `features` groups have these in place of their tiles, and images are not read again. `given` has, by name and
    group, a number for each comparison.
    """

    source: GroupSource = dataclasses.field(repr=False)  # Grain writes out the repr of what it maps
    processor: Processor
    views: dict[str, BranchInput]
    kept: tuple[int, ...] = dataclasses.field(repr=False)
    shapes: tuple[GroupShape, ...] = dataclasses.field(repr=False)
    cache: dict[int, EncodedGroup] = dataclasses.field(repr=False)
    features: SourceFeatures | None = None
    given: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.kept)

    def group(self, index: int) -> Group:
        """The raw group behind an encoded one."""
        return self.source[self.kept[index]]

    def describe(self, index: int) -> dict[str, Any]:
        """Where the group at `index` comes from: its index, id, file and row."""
        group = self.group(index)
        return {"index": index, "id": group.id, "file": group.file, "row": group.row}

    def encode(self, index: int, change: Change = unchanged) -> EncodedGroup | Quarantined:
        """The group at `index` as arrays, or why it cannot be used; `change` is done to its images first."""
        encoded = self._encode(index, change)
        if isinstance(encoded, Quarantined) or not self.given:
            return encoded
        return dataclasses.replace(encoded, given={name: values[index] for name, values in self.given.items()})

    def _encode(self, index: int, change: Change) -> EncodedGroup | Quarantined:
        if index not in self.cache:
            return self.encode_group(self.group(index), index, change)
        encoded = self.cache[index]
        try:
            if self.features is not None:
                return dataclasses.replace(encoded, tiles=joined(self.features.of(index)))
            if change is unchanged or encoded.tiles is None:
                return encoded
            tiles = [self.processor.tiles(image, change) for image in self.group(index).images]
            return dataclasses.replace(encoded, tiles=joined(tiles))
        except ImageError as error:
            return Quarantined(*_problem(self.group(index), error))

    def each_row(self, index: int, problem: Quarantined) -> list[Quarantined]:
        """An entry for every record that the group at `index` was made of, where `encode` gave `problem`."""
        rows = self.group(index).joined
        return [dataclasses.replace(problem, file=f, row=r, id=i) for f, r, i in rows] or [problem]

    def only(self, indices: Sequence[int]) -> EncodedSource:
        """These groups alone, numbered anew."""
        cache = {new: dataclasses.replace(self.cache[i], index=new) for new, i in enumerate(indices) if i in self.cache}
        kept, shapes = (tuple(values[i] for i in indices) for values in (self.kept, self.shapes))
        given = {name: [values[i] for i in indices] for name, values in self.given.items()}
        return dataclasses.replace(self, kept=kept, shapes=shapes, cache=cache, given=given)

    def environments(self) -> list[str]:
        """The environment of each group."""
        return [self.group(i).environment for i in range(len(self))]

    def with_environments(self, names: Sequence[str]) -> EncodedSource:
        """The same with the number of each comparison's environment in `given`, from 0 in the order of their names."""
        number = {name: float(k) for k, name in enumerate(sorted(set(names)))}
        values = [np.full(s.comparisons, number[n], np.float32) for n, s in zip(names, self.shapes, strict=True)]
        return dataclasses.replace(self, given={**self.given, ENVIRONMENT: values})

    @property
    def comparisons(self) -> int:
        """The comparisons of all groups."""
        return sum(shape.comparisons for shape in self.shapes)

    def with_numbers(self) -> EncodedSource:
        """The same with each comparison's place among all of them in `given`, from 0.

        Raises ValueError where there are more than 2^24 of them: float32, which what is given is, counts no further.
        """
        if self.comparisons > 2**24:
            raise ValueError(f"numbers can be kept of at most {2**24} comparisons, and there are {self.comparisons}")
        ends = np.cumsum([shape.comparisons for shape in self.shapes])
        values = np.split(np.arange(self.comparisons, dtype=np.float32), ends[:-1])
        return dataclasses.replace(self, given={**self.given, NUMBER: values})

    def encode_group(self, group: Group, index: int, change: Change = unchanged) -> EncodedGroup | Quarantined:
        """As `encode`, of a group that has been read already."""
        try:
            features = None if self.features is None else self.features.of(index)
            return self.processor.encode(group, index, self.views, change, features)
        except (ImageError, TextError) as error:
            return Quarantined(*_problem(group, error))


def _problem(group: Group, error: Exception) -> tuple[str, int, str, str | None]:
    """The fields of a Quarantined; what kind of problem it is comes first."""
    kind = "unusable image: " if isinstance(error, ImageError) else ""
    return group.file, group.row, f"{kind}{error}", group.id


def index_source(
    source: GroupSource,
    processor: Processor,
    views: dict[str, BranchInput],
    *,
    cache: bool,
    progress: Callable[[range], Iterable[int]] = lambda x: x,
) -> tuple[EncodedSource, list[Quarantined]]:
    """Measure every group of a source, and with `cache` encode it for good.

    Without `cache` only text and image headers are read, of several processes by each its part, and a picture that does
    not decode is met later, by `EncodedSource.encode`. Groups over the token budget or with an unreadable image are
    returned as quarantined, with the reason.
    """
    if not cache:
        return _measure_source(source, processor, views, progress)
    kept: list[int] = []
    encoded: dict[int, EncodedGroup] = {}
    own: list[tuple[int, tuple[Any, ...]]] = []
    for i in progress(range(len(source))):
        group = source[i]
        try:
            encoded[len(kept)] = processor.encode(group, len(kept), views)
            kept.append(i)
        except (ImageError, TextError) as error:
            own.append((i, _problem(group, error)))
    shapes = tuple(each.shape for each in encoded.values())
    data = EncodedSource(source, processor, views, tuple(kept), shapes, encoded)
    # A picture that one process could not read, as a file system may once, is left out by all: they share a plan.
    failed = {i: problem for each in divided(lambda _: own, jax.process_count()) for i, problem in each}
    if any(i in failed for i in kept):
        data = data.only([place for place, i in enumerate(kept) if i not in failed])
    return data, [Quarantined(*failed[i]) for i in sorted(failed)]


def _measure_source(
    source: GroupSource,
    processor: Processor,
    views: dict[str, BranchInput],
    progress: Callable[[range], Iterable[int]],
) -> tuple[EncodedSource, list[Quarantined]]:
    def measure(index: int) -> dict[str, Any]:
        group = source[index]
        try:
            return {"shape": dataclasses.asdict(processor.measure(group, views))}
        except (ImageError, TextError) as error:
            return {"problem": _problem(group, error)}

    found = divided(measure, len(source), progress)
    kept = tuple(i for i, each in enumerate(found) if "shape" in each)
    measured = (found[i]["shape"] for i in kept)
    shapes = tuple(GroupShape(**shape | {"responses": tuple(shape["responses"])}) for shape in measured)
    quarantined = [Quarantined(*each["problem"]) for each in found if "problem" in each]
    return EncodedSource(source, processor, views, kept, shapes, {}), quarantined


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Step -> positions of its groups, which are of one bucket: little of the batch is padding.

    Groups stream by, epoch after epoch, each epoch shuffled by (seed, epoch), and a batch is made whenever one of the
    `buckets` (that of each group) has gathered enough of them; buckets too small for a batch are joined. What is left
    of each at the end of the stream makes the last batches together, so over all `steps` every group is visited
    steps * batch_size / (number of groups) times, rounded down or up. With `positions` these are the groups there are,
    and `buckets` is theirs.
    """

    buckets: Sequence[int] = dataclasses.field(repr=False)  # Grain writes out the repr of a plan
    batch_size: int
    seed: int
    steps: int
    positions: np.ndarray | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> np.ndarray:
        batch = self._batches[index]
        return batch if self.positions is None else self.positions[batch]

    def of_each_mix(self) -> list[np.ndarray]:
        """The positions of one batch for every set of buckets that batches have groups of, in the order of steps."""
        rows = np.asarray(self.buckets)[self._batches]
        held = np.stack([np.any(rows == bucket, axis=1) for bucket in np.unique(rows)], axis=1)
        return [self[i] for i in sorted(np.unique(held, axis=0, return_index=True)[1])]

    @functools.cached_property
    def _batches(self) -> np.ndarray:
        """[steps, batch_size] positions, int32."""
        total, size = self.steps * self.batch_size, self.batch_size
        stream = self._stream(total)
        bucket = _joined(self.buckets, size)[stream]
        times = [np.flatnonzero(bucket == b) for b in np.unique(bucket)]
        full = np.concatenate([t[: len(t) // size * size] for t in times]).reshape(-1, size)
        rest = np.concatenate([t[len(t) // size * size :] for t in times]).reshape(-1, size)
        return stream[np.concatenate([full[np.argsort(full[:, -1])], rest])]

    def _stream(self, count: int) -> np.ndarray:
        n = len(self.buckets)
        epochs = range(-(-count // n))
        shuffled = [np.random.default_rng([self.seed, 0, e]).permutation(n).astype(np.int32) for e in epochs]
        return np.concatenate(shuffled)[:count]


def _joined(buckets: Sequence[int], least: int) -> np.ndarray:
    """The buckets numbered anew, neighbours as one until each has at least `least` groups."""
    numbers, held = [], [0]
    for count in np.bincount(buckets):
        numbers.append(len(held) - 1)
        held[-1] += count
        if held[-1] >= least:
            held.append(0)
    return np.minimum(numbers, max(len(held) - 2, 0))[np.asarray(buckets)]


@dataclasses.dataclass(frozen=True)
class ListPlan:
    """Every position of a list once, in order; the last batch may be short."""

    positions: Sequence[int] = dataclasses.field(repr=False)
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.positions[index * self.batch_size : (index + 1) * self.batch_size])


@dataclasses.dataclass(frozen=True)
class MakeBatch:
    """Positions -> padded batch: the step of the pipeline that workers run.

    Of several processes each takes its `share` of the batch, padded like those of the others. A group that cannot be
    read leaves padding; it is appended to `quarantine`, once, or raises DataError where `strict`.
    """

    data: EncodedSource
    buckets: Buckets
    batch_size: int
    micro_batches: int = 1
    quarantine: Path | None = None
    strict: bool = False
    share: int = 0
    shares: int = 1
    augmentation: Augmentation = NO_AUGMENTATION

    def __post_init__(self) -> None:
        parts = self.micro_batches * self.shares
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be split into micro_batches={self.micro_batches} on "
                f"{self.shares} process(es): it must be a multiple of {parts}"
            )

    def __call__(self, positions: np.ndarray) -> Batch:
        """The batch of the groups at `positions`, their images as they are."""
        return self._collate(positions, lambda position: self.data.encode(position))

    def random(self, positions: np.ndarray, rng: np.random.Generator) -> Batch:
        """The batch with every image changed as `augmentation` says; what a group draws is the same in any process."""
        drawn = int(rng.integers(2**63))

        def encode(position: int) -> EncodedGroup | Quarantined:
            mine = np.random.default_rng([drawn, position])
            return self.data.encode(position, functools.partial(augment, how=self.augmentation, rng=mine))

        return self._collate(positions, encode)

    def padding(self, positions: np.ndarray) -> Batch:
        """A batch of the size of that of the groups at `positions`, without them: what a step is compiled for."""
        return self._collate(positions, lambda position: None)

    def _collate(self, positions: np.ndarray, encode: Callable[[int], EncodedGroup | Quarantined | None]) -> Batch:
        encoded = [(int(p), encode(int(p))) for p in positions[self.share :: self.shares]]
        groups = [e for _, e in encoded if isinstance(e, EncodedGroup)]
        bad = [entry for p, e in encoded if isinstance(e, Quarantined) for entry in self.data.each_row(p, e)]
        if self.strict:
            raise_first(bad)
        if self.quarantine is not None:
            _append(self.quarantine, bad)
        return collate(
            groups,
            self.buckets,
            num_groups=self.batch_size // self.shares,
            micro_batches=self.micro_batches,
            views=self.data.views,
            room_for=[self.data.shapes[int(p)] for p in positions],
            blank=None if self.data.features is None else self.data.features.blank,
            given=sorted(self.data.given),
        )


def _append(path: Path, entries: Sequence[Quarantined]) -> None:
    if not entries:
        return
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = dict.fromkeys(json.dumps(dataclasses.asdict(entry)) for entry in entries)
    known = set(before.splitlines())
    new = "".join(line + "\n" for line in lines if line not in known)
    if before and not before.endswith("\n"):  # cut short, by a full disk or a kill
        new = "\n" + new
    with path.open("ab", buffering=0) as file:  # one write: others append to the file, too
        file.write(new.encode())


def buckets_for(datasets: Sequence[EncodedSource], k: int) -> Buckets:
    """Buckets that cover several data sets, so that all of them share one set of compilations."""
    shapes = [s for d in datasets for s in d.shapes]
    return fit_buckets(shapes, k, datasets[0].processor.preprocessing.image_size)


def batches(
    plan: BatchPlan | ListPlan,
    make: Callable[..., T],
    *,
    start: int = 0,
    workers: int = 0,
    seed: int | None = None,
) -> grain.IterDataset[T]:
    """The stream of batches that `make` makes of a plan from step `start` on, the same for any number of workers.

    With a `seed`, `make` is also given a generator, which depends on the seed and the step alone. The iterator's state
    can be saved and set (`get_state`, `set_state`) as long as `start` and `workers` stay the same.
    """
    steps = grain.MapDataset.source(plan)
    made = steps.map(make) if seed is None else steps.random_map(make, seed=seed)
    stream = made[start:].to_iter_dataset(_READ_AHEAD)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which only absl's own main parses
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return stream
