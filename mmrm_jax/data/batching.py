"""Encoded groups -> padded batches of a few static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from mmrm_jax.data.images import blank_tile
from mmrm_jax.data.packing import Rows, fit_rows, pack, row_length
from mmrm_jax.data.text import Conversation
from mmrm_jax.types import Batch, Comparison, Comparisons, Prefix, Responses


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """What a group needs of a batch, the sizes that padding has to cover; `responses` has the length of each."""

    prefixes: dict[str, int]
    responses: tuple[int, ...]
    tiles: int
    comparisons: int


@dataclasses.dataclass(frozen=True)
class EncodedGroup:
    """A group as arrays: token ids, uint8 tiles [T, S, S, 3] (None where no branch looks at the image)."""

    index: int
    prefixes: dict[str, Conversation]
    responses: tuple[np.ndarray, ...]
    tiles: np.ndarray | None
    comparisons: tuple[Comparison, ...]

    @property
    def shape(self) -> GroupShape:
        """The sizes that padding has to cover."""
        return GroupShape(
            prefixes={b: len(c.tokens) for b, c in self.prefixes.items()},
            responses=tuple(map(len, self.responses)),
            tiles=0 if self.tiles is None else len(self.tiles),
            comparisons=len(self.comparisons),
        )


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes each padded dimension may take, ascending; a batch takes the smallest that fits.

    `rows` are the shapes (K, L) that a group's responses are packed into, the cheapest first; `responses` is the most
    responses of a group. The number of batch shapes, and so of compilations, is at most `count`.
    """

    prefixes: dict[str, tuple[int, ...]]
    rows: tuple[Rows, ...]
    responses: int
    tiles: tuple[int, ...]
    comparisons: int
    image_size: int

    @property
    def count(self) -> int:
        """Upper bound on the number of different batch shapes."""
        sizes = [len(s) for s in (*self.prefixes.values(), self.rows, self.tiles)]
        return int(np.prod(sizes))

    def smallest_rows(self, groups: Iterable[GroupShape]) -> int:
        """Index of the first of `rows` that every one of these groups fits in. Raises ValueError where none is."""
        needed = {group.responses for group in groups}
        most = max(map(len, needed), default=0)
        for i, (count, length) in enumerate(self.rows):
            if most <= self.responses and all(row_length(lengths, count) <= length for lengths in needed):
                return i
        tokens = max(sum(lengths) for lengths in needed)
        raise ValueError(
            f"a group of {most} responses, or one of {tokens} tokens in all, is larger than the largest "
            f"bucket ({self.responses} responses in rows of {self.rows}): fit buckets to all data"
        )


def _rounded_up(value: int, multiple: int) -> int:
    return max(multiple, -(-value // multiple) * multiple)


def fit_buckets(shapes: Iterable[GroupShape], k: int, image_size: int, *, multiple: int = 4) -> Buckets:
    """Buckets chosen by the data: up to `k` shapes of rows (lengths are multiples of `multiple`), the other sizes one
    each, since responses are where lengths differ most within a data set. `image_size` is a tile's side in pixels.

    Raises ValueError for no shapes.
    """
    shapes = list(shapes)
    if not shapes:
        raise ValueError("no groups to fit buckets to")
    return Buckets(
        prefixes={b: (_rounded_up(max(s.prefixes[b] for s in shapes), multiple),) for b in shapes[0].prefixes},
        rows=fit_rows([s.responses for s in shapes], k, multiple),
        responses=max(len(s.responses) for s in shapes),
        tiles=(max(s.tiles for s in shapes),),
        comparisons=max(1, max(s.comparisons for s in shapes)),
        image_size=image_size,
    )


def _smallest(sizes: Sequence[int], needed: int) -> int:
    fitting = [s for s in sizes if s >= needed]
    if not fitting:
        raise ValueError(
            f"a group needs size {needed}, more than the largest bucket of {sizes}: fit buckets to all data"
        )
    return fitting[0]


def _pad_rows(rows: Sequence[np.ndarray], count: int, width: int, fill: int = 0) -> np.ndarray:
    out = np.full((count, width), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def collate(
    groups: Sequence[EncodedGroup],
    buckets: Buckets,
    *,
    num_groups: int,
    micro_batches: int,
    views: Mapping[str, str],
    room_for: Iterable[GroupShape] = (),
) -> Batch:
    """A batch [M, num_groups / M, ...] of at most `num_groups` groups; the rest is padding.

    A group and its comparisons stay in one micro-batch; all micro-batches share one shape. Its rows have room for the
    responses of `room_for` too, groups that other processes hold say. Raises ValueError where no bucket fits a group.
    """
    size = num_groups // micro_batches
    rows = buckets.rows[buckets.smallest_rows([*room_for, *(g.shape for g in groups)])]
    tiles = _smallest(buckets.tiles, max((len(g.tiles) for g in groups if g.tiles is not None), default=0))
    prefix = {
        b: _smallest(sizes, max((len(g.prefixes[b].tokens) for g in groups), default=1))
        for b, sizes in buckets.prefixes.items()
    }
    # Round robin, so that a batch that is not full is spread evenly over the micro-batches.
    parts = [
        _collate_micro(groups[m::micro_batches], buckets, size, (prefix, rows, tiles), views)
        for m in range(micro_batches)
    ]
    return jax.tree.map(lambda *xs: np.stack(xs), *parts)


def _collate_micro(
    groups: Sequence[EncodedGroup],
    buckets: Buckets,
    size: int,
    shape: tuple[dict[str, int], Rows, int],
    views: Mapping[str, str],
) -> Batch:
    prefix_sizes, rows, tiles_size = shape
    prefixes = {}
    for branch, width in prefix_sizes.items():
        pixels = _pixels(groups, size, tiles_size, buckets.image_size, views[branch])
        prefixes[branch] = _prefix([g.prefixes[branch] for g in groups], size, width, pixels)
    compared: list[tuple[int, int, float, bool]] = []
    for g, group in enumerate(groups):
        base = g * buckets.responses
        compared += [(base + c.winner, base + c.loser, c.margin, c.tie) for c in group.comparisons]
    index = np.full(size, -1, np.int32)
    index[: len(groups)] = [g.index for g in groups]
    responses = _responses(groups, size, rows, buckets.responses)
    return Batch(prefixes, responses, _comparisons(compared, size * buckets.comparisons), index)  # type: ignore[arg-type]


def _responses(groups: Sequence[EncodedGroup], size: int, rows: Rows, most: int) -> Responses:
    count, length = rows
    tokens, positions = np.zeros((2, size, count, length), np.int32)
    last = np.full((size, most), -1, np.int32)
    for g, group in enumerate(groups):
        places = pack(list(map(len, group.responses)), count)
        for n, (response, (row, start)) in enumerate(zip(group.responses, places, strict=True)):
            end = start + len(response)
            tokens[g, row, start:end], positions[g, row, start:end] = response, np.arange(len(response))
            last[g, n] = row * length + end - 1
    return Responses(tokens, positions, last)  # type: ignore[arg-type]


def _comparisons(compared: Sequence[tuple[int, int, float, bool]], size: int) -> Comparisons:
    index, margin = np.zeros((size, 2), np.int32), np.zeros(size, np.float32)
    tie, mask = np.zeros(size, bool), np.zeros(size, bool)
    for c, (winner, loser, target, tied) in enumerate(compared):
        index[c], margin[c], tie[c], mask[c] = (winner, loser), target, tied, True
    return Comparisons(index, margin, tie, mask)  # type: ignore[arg-type]


def _prefix(conversations: Sequence[Conversation], size: int, width: int, pixels: np.ndarray | None) -> Prefix:
    tokens = _pad_rows([c.tokens for c in conversations], size, width)
    visual = _pad_rows([c.visual for c in conversations], size, width, fill=-1)
    lengths = np.zeros(size, np.int32)
    lengths[: len(conversations)] = [len(c.tokens) for c in conversations]
    return Prefix(tokens, lengths, visual, pixels)  # type: ignore[arg-type]


def _pixels(groups: Sequence[EncodedGroup], size: int, tiles_size: int, side: int, view: str) -> np.ndarray | None:
    if view == "blank":
        return blank_tile(side)[None]
    if view == "absent" or not tiles_size:
        return None
    pixels = np.zeros((size, tiles_size, side, side, 3), np.uint8)
    for g, group in enumerate(groups):
        if group.tiles is not None:
            pixels[g, : len(group.tiles)] = group.tiles
    return pixels
