"""The few static shapes that batches are padded to, chosen by the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mmrm_jax.data.packing import Rows, cost, row_length

CUTS = 32  # places at which a set of groups may be divided in two, along each of its sizes


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """What a group needs of a batch, the sizes that padding has to cover; `responses` has the length of each."""

    prefixes: dict[str, int]
    responses: tuple[int, ...]
    tiles: int
    comparisons: int

    @property
    def tokens(self) -> int:
        """Tokens of all branches, which the tiles' visual tokens are among."""
        return sum(self.prefixes.values()) + len(self.prefixes) * sum(self.responses)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What every group of a batch is padded to: a prefix of each branch, rows (K, L) of responses, tiles."""

    prefixes: dict[str, int]
    rows: Rows
    tiles: int

    def fits(self, group: GroupShape) -> bool:
        """Whether a group can be padded to this."""
        count, length = self.rows
        prefixes = all(group.prefixes[b] <= n for b, n in self.prefixes.items())
        return prefixes and group.tiles <= self.tiles and row_length(group.responses, count) <= length

    @property
    def tokens(self) -> int:
        """Tokens of all branches that a group becomes, padding included."""
        return sum(self.prefixes.values()) + len(self.prefixes) * self.rows[0] * self.rows[1]

    @property
    def key(self) -> tuple[tuple[tuple[str, int], ...], Rows, int]:
        """The same sizes, hashable."""
        return tuple(self.prefixes.items()), self.rows, self.tiles

    @property
    def cost(self) -> float:
        """What a group of this shape costs, in tokens of short rows: see `packing.cost`."""
        return sum(self.prefixes.values()) + len(self.prefixes) * cost(self.rows)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes a batch may have, the cheapest first; the last fits every group they were fitted to.

    `responses` is the most responses of a group, `comparisons` the most comparisons. A step is compiled at most once
    for each shape.
    """

    shapes: tuple[BatchShape, ...]
    responses: int
    comparisons: int
    image_size: int

    def of(self, group: GroupShape) -> int:
        """Index of the first shape that fits a group. Raises ValueError where none does."""
        if len(group.responses) <= self.responses and group.comparisons <= self.comparisons:
            for i, shape in enumerate(self.shapes):
                if shape.fits(group):
                    return i
        raise ValueError(
            f"a group of {len(group.responses)} responses ({sum(group.responses)} tokens), {group.comparisons} "
            f"comparisons, {group.tiles} tiles and prefixes {group.prefixes} is larger than the largest bucket "
            f"({self.shapes[-1]}, {self.responses} responses, {self.comparisons} comparisons): fit buckets to all data"
        )

    def padding(self, groups: Sequence[GroupShape]) -> float:
        """The share of tokens that is padding, in batches of groups of one bucket each."""
        return 1 - sum(g.tokens for g in groups) / sum(self.shapes[self.of(g)].tokens for g in groups)

    def smallest(self, groups: Iterable[GroupShape]) -> BatchShape:
        """The cheapest shape that fits all of these groups. Raises ValueError where none does."""
        groups = list(groups)
        first = max((self.of(group) for group in groups), default=0)
        return next(s for s in self.shapes[first:] if s is self.shapes[-1] or all(map(s.fits, groups)))


def fit_buckets(shapes: Iterable[GroupShape], k: int, image_size: int, *, multiple: int = 4) -> Buckets:
    """Up to `k` shapes that waste little on padding; the side of a tile is `image_size`.

    All groups begin as one set. Again and again a set is divided in two by one of its sizes, there where it saves the
    most, and each set gets the smallest shape that fits all of it, lengths being multiples of `multiple`. The costliest
    is made to fit all groups, since what is left over from each set comes together in a batch. Raises ValueError for no
    shapes.
    """
    shapes = list(shapes)
    if not shapes:
        raise ValueError("no groups to fit buckets to")
    branches = list(shapes[0].prefixes)
    most = max(len(s.responses) for s in shapes)
    counts = sorted({-(-most // 2**i) for i in range(most.bit_length() + 1)})
    sizes = np.array(
        [[*s.prefixes.values(), s.tiles, *(row_length(s.responses, count) for count in counts)] for s in shapes]
    )

    def tight(largest: np.ndarray) -> BatchShape:
        prefixes, tiles, lengths = np.split(largest, [len(branches), len(branches) + 1])
        widths = {b: _rounded_up(int(n), multiple) for b, n in zip(branches, prefixes, strict=True)}
        rows = [(count, _rounded_up(int(n), multiple)) for count, n in zip(counts, lengths, strict=True)]
        return BatchShape(widths, min(rows, key=cost), int(tiles[0]))

    found = sorted(map(tight, _divided(sizes, k, lambda largest: tight(largest).cost)), key=_cost)
    distinct = {(*s.prefixes.values(), s.tiles, *s.rows): s for s in [*found[:-1], tight(sizes.max(0))]}
    return Buckets(
        shapes=tuple(sorted(distinct.values(), key=_cost)),
        responses=most,
        comparisons=max(1, max(s.comparisons for s in shapes)),
        image_size=image_size,
    )


def _divided(sizes: np.ndarray, k: int, cost_of: Callable[[np.ndarray], float]) -> list[np.ndarray]:
    """The largest sizes of each of up to `k` sets of the rows of `sizes`, chosen so that they cost little together.

    `cost_of(largest sizes)` is what each member of a set costs.
    """

    def best(members: np.ndarray) -> tuple[float, list[np.ndarray]]:
        now = len(members) * cost_of(members.max(0))
        options = [(0.0, [members])]
        for column in range(members.shape[1]):
            ordered = members[np.argsort(members[:, column], kind="stable")]
            below, above = np.maximum.accumulate(ordered), np.maximum.accumulate(ordered[::-1])[::-1]
            steps = np.flatnonzero(np.diff(ordered[:, column])) + 1
            for at in steps[np.unique(np.linspace(0, len(steps) - 1, CUTS).astype(int))] if len(steps) else ():
                saved = now - at * cost_of(below[at - 1]) - (len(ordered) - at) * cost_of(above[at])
                options.append((saved, [ordered[:at], ordered[at:]]))
        return max(options, key=lambda option: option[0])

    sets = [best(sizes)]  # each as what dividing it saves, and its parts
    while len(sets) < k:
        i = max(range(len(sets)), key=lambda i: sets[i][0])
        if sets[i][0] <= 0:
            break
        sets[i : i + 1] = map(best, sets[i][1])
    return [np.concatenate(parts).max(0) for _, parts in sets]


def _cost(shape: BatchShape) -> float:
    return shape.cost


def _rounded_up(value: int, multiple: int) -> int:
    return max(multiple, -(-value // multiple) * multiple)
