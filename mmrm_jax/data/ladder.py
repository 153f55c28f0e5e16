"""Shapes for requests that nobody has measured before: few of them, whatever comes.

`fit_buckets` chooses shapes by data that is there; requests are yet to come. So every size is rounded up to a step
on a ladder (1, 1.5, 2, 3, 4, 6, 8, ... times its lowest), which wastes less than half and leaves a few dozen steps a
size.
"""

from __future__ import annotations

import dataclasses

from mmrm_jax.data.buckets import BatchShape, Buckets, GroupShape
from mmrm_jax.data.packing import cost, row_length

LEAST_PREFIX, LEAST_ROW = 16, 8  # tokens


def step_up(size: int, least: int = 1) -> int:
    """The lowest of `least` times 1, 1.5, 2, 3, 4, 6, 8, ... that is no less than `size`; steps are whole numbers."""
    power = least
    while power < size:
        middle = power + power // 2
        if size <= middle:
            return middle
        power *= 2
    return power


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The shapes of groups of up to `responses` responses of a processor's `max_length` tokens.

    `tiles` is the most that one image becomes: a step of its own, since a tile costs what hundreds of tokens do.
    """

    max_length: int
    tiles: int
    image_size: int
    responses: int = 64

    def shape(self, group: GroupShape) -> BatchShape:
        """The shape on the ladder that a group is padded to; rows of responses are powers of two of them.

        Raises ValueError for more than `responses` responses.
        """
        if len(group.responses) > self.responses:
            raise ValueError(f"a group of {len(group.responses)} responses; at most {self.responses}: split it")
        counts = [2**i for i in range((len(group.responses) - 1).bit_length() + 1)]
        lengths = ((count, row_length(group.responses, count)) for count in counts)
        rows = [(count, self._tokens(n, LEAST_ROW)) for count, n in lengths if n <= self.max_length]
        prefixes = {branch: self._tokens(n, LEAST_PREFIX) for branch, n in group.prefixes.items()}
        return BatchShape(prefixes, min(rows, key=cost), self._tiles(group.tiles))

    def buckets(self, shape: BatchShape) -> Buckets:
        """This one shape in the form that `collate` takes."""
        return Buckets((shape,), self.responses, comparisons=1, image_size=self.image_size)

    def _tokens(self, count: int, least: int) -> int:
        return min(step_up(count, least), max(self.max_length, least))

    def _tiles(self, count: int) -> int:
        return count and (min(step_up(count), self.tiles) if count <= self.tiles else step_up(count))
