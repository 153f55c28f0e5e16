"""Responses of a group in as few padded tokens as their lengths allow: several of them share a row."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

import numpy as np

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


def fit_rows(lengths: Sequence[tuple[int, ...]], k: int, multiple: int) -> tuple[Rows, ...]:
    """Up to `k` shapes of rows, the cheapest first, for groups with responses of these lengths: each fits in one.

    The first that is chosen fits all groups, each other one saves most (greedy). Lengths are multiples of `multiple`.
    """
    most = max(map(len, lengths))
    counts = sorted({-(-most // 2**i) for i in range(most.bit_length() + 1)})
    needed = np.array([[row_length(group, count) for count in counts] for group in lengths])
    shares = np.arange(1, 17) / 16
    candidates = []  # (rows, which groups fit)
    for column, count in zip(needed.T, counts, strict=True):
        quantiles = np.quantile(column, shares, method="inverted_cdf")
        for length in {max(multiple, -(-int(q) // multiple) * multiple) for q in quantiles}:
            candidates.append(((count, length), column <= length))
    candidates.sort(key=lambda candidate: cost(candidate[0]))
    chosen = [next(rows for rows, fits in candidates if fits.all())]
    now = np.full(len(lengths), cost(chosen[0]))
    while len(chosen) < k:
        costs = [np.where(fits, np.minimum(now, cost(rows)), now) for rows, fits in candidates]
        best = int(np.argmin([c.sum() for c in costs]))
        if costs[best].sum() >= now.sum():
            break
        chosen.append(candidates[best][0])
        now = costs[best]
    return tuple(sorted(chosen, key=cost))
