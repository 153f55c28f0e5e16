"""Encoded groups -> padded batches of a few static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from mmrm_jax.config import TEXT_VIEWS
from mmrm_jax.data.buckets import BatchShape, Buckets, GroupShape
from mmrm_jax.data.images import blank_tile
from mmrm_jax.data.packing import Rows, pack
from mmrm_jax.data.text import Conversation
from mmrm_jax.types import Batch, Comparison, Comparisons, Prefix, Responses


@dataclasses.dataclass(frozen=True)
class EncodedGroup:
    """A group as arrays: token ids and tiles, None where no branch looks at the image.

    Tiles are uint8 [T, S, S, 3], or what a frozen tower made of them, [T, V, I]. `given` has one number a comparison.
    `opening` is how many tokens of every response are in the prefixes, since all begin with them.
    """

    index: int
    prefixes: dict[str, Conversation]
    responses: tuple[np.ndarray, ...]
    tiles: np.ndarray | None
    comparisons: tuple[Comparison, ...]
    given: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    opening: int = 0

    @property
    def shape(self) -> GroupShape:
        """The sizes that padding has to cover."""
        return GroupShape(
            prefixes={b: len(c.tokens) for b, c in self.prefixes.items()},
            responses=tuple(map(len, self.responses)),
            tiles=0 if self.tiles is None else len(self.tiles),
            comparisons=len(self.comparisons),
        )


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
    blank: np.ndarray | None = None,
    given: Sequence[str] = (),
) -> Batch:
    """A batch [M, num_groups / M, ...] of at most `num_groups` groups; the rest is padding.

    `blank` is the white tile in the form that all tiles are in, [1, ...]; pixels unless it is given. `given` names what
    comparisons have from a run before. A group and its comparisons stay in one micro-batch; all micro-batches share one
    shape, the cheapest that also fits `room_for`: groups that other processes hold, say. Raises ValueError where none
    fits a group.
    """
    size = num_groups // micro_batches
    shape = buckets.smallest([*room_for, *(g.shape for g in groups)])
    # Round robin, so that a batch that is not full is spread evenly over the micro-batches.
    blank = blank_tile(buckets.image_size) if blank is None else blank
    parts = [
        _collate_micro(groups[m::micro_batches], buckets, size, shape, views, blank, given)
        for m in range(micro_batches)
    ]
    return jax.tree.map(lambda *xs: np.stack(xs), *parts)


def _collate_micro(
    groups: Sequence[EncodedGroup],
    buckets: Buckets,
    size: int,
    shape: BatchShape,
    views: Mapping[str, str],
    blank: np.ndarray,
    given: Sequence[str],
) -> Batch:
    prefixes = {}
    for branch, width in shape.prefixes.items():
        tiles = _tiles(groups, size, shape.tiles, blank, views[branch])
        prefixes[branch] = _prefix([g.prefixes[branch] for g in groups], size, width, tiles)
    compared: list[tuple[int, int, float, bool]] = []
    for g, group in enumerate(groups):
        base = g * buckets.responses
        compared += [(base + c.winner, base + c.loser, c.margin, c.tie) for c in group.comparisons]
    index = np.full(size, -1, np.int32)
    index[: len(groups)] = [g.index for g in groups]
    responses = _responses(groups, size, shape.rows, buckets.responses)
    comparisons = _comparisons(compared, size * buckets.comparisons)
    for name in given:
        values = np.concatenate([g.given[name] for g in groups]) if groups else np.zeros(0)
        comparisons.given[name] = np.zeros(len(comparisons.mask), np.float32)  # type: ignore[assignment]
        comparisons.given[name][: len(values)] = values  # type: ignore[index]
    return Batch(prefixes, responses, comparisons, index)  # type: ignore[arg-type]


def _responses(groups: Sequence[EncodedGroup], size: int, rows: Rows, most: int) -> Responses:
    count, length = rows
    tokens, positions = np.zeros((2, size, count, length), np.int32)
    last, opening = np.full((size, most), -1, np.int32), np.zeros(size, np.int32)
    for g, group in enumerate(groups):
        opening[g] = group.opening
        places = pack(list(map(len, group.responses)), count)
        for n, (response, (row, start)) in enumerate(zip(group.responses, places, strict=True)):
            end = start + len(response)
            tokens[g, row, start:end], positions[g, row, start:end] = response, np.arange(len(response))
            last[g, n] = row * length + end - 1
    return Responses(tokens, positions, last, opening)  # type: ignore[arg-type]


def _comparisons(compared: Sequence[tuple[int, int, float, bool]], size: int) -> Comparisons:
    index, margin = np.zeros((size, 2), np.int32), np.zeros(size, np.float32)
    tie, mask = np.zeros(size, bool), np.zeros(size, bool)
    for c, (winner, loser, target, tied) in enumerate(compared):
        index[c], margin[c], tie[c], mask[c] = (winner, loser), target, tied, True
    return Comparisons(index, margin, tie, mask)  # type: ignore[arg-type]


def _prefix(conversations: Sequence[Conversation], size: int, width: int, tiles: np.ndarray | None) -> Prefix:
    tokens = _pad_rows([c.tokens for c in conversations], size, width)
    visual = _pad_rows([c.visual for c in conversations], size, width, fill=-1)
    lengths = np.zeros(size, np.int32)
    lengths[: len(conversations)] = [len(c.tokens) for c in conversations]
    pixels, features = (tiles, None) if tiles is None or tiles.dtype == np.uint8 else (None, tiles)
    return Prefix(tokens, lengths, visual, pixels, features)  # type: ignore[arg-type]


def _tiles(
    groups: Sequence[EncodedGroup], size: int, tiles_size: int, blank: np.ndarray, view: str
) -> np.ndarray | None:
    if view == "blank":
        return blank[None]
    if view in TEXT_VIEWS or not tiles_size:
        return None
    tiles = np.zeros((size, tiles_size, *blank.shape[1:]), blank.dtype)
    for g, group in enumerate(groups):
        if group.tiles is not None:
            tiles[g, : len(group.tiles)] = group.tiles
    return tiles
