"""Responses of a group in as few padded tokens as their lengths allow: several of them share a row."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

# Tokens of a row at which attention within it is taken to cost what all else does of a token. It weighs few long rows,
# in which every token is compared with more that are not of its response, against many short ones.
ROW_COST = 1024

Rows = tuple[int, int]  # (K, L): K rows of L tokens


def pack(lengths: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(row, first token in it) of each response: the longest first, each into the emptiest row (Graham 1969)."""
    places = [(0, 0)] * len(lengths)
    filled = [(0, row) for row in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        start, row = filled[0]
        places[i] = (row, start)
        heapq.heapreplace(filled, (start + lengths[i], row))
    return places


@functools.lru_cache(maxsize=2**16)
def row_length(lengths: tuple[int, ...], rows: int) -> int:
    """Tokens that the longest of `rows` rows needs to hold responses of these lengths, as `pack` lays them out."""
    return max((start + n for (_, start), n in zip(pack(lengths, rows), lengths, strict=True)), default=0)


def cost(rows: Rows) -> float:
    """What a group in these rows costs: its tokens, with more for each that attention has to look at."""
    count, length = rows
    return count * length * (1 + length / ROW_COST)
