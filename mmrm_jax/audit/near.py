"""Texts that are nearly the same: MinHash finds candidates, their words decide.

Two texts are near duplicates where the sets of their words and word pairs have a Jaccard similarity of at least
THRESHOLD. Source: Broder, "On the resemblance and containment of documents", 1997; banding as in Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", chapter 3: 20 bands of 5 hashes miss a pair of similarity .8 once in 2,800
times.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

THRESHOLD = 0.8
_BANDS, _ROWS = 20, 5
_PRIME = 2**31 - 1
_AT_ONCE = 20_000  # pairs


def near_pairs(sets: csr_array) -> tuple[Int[np.ndarray, "P 2"], Float[np.ndarray, "P"]]:
    """(pairs of near duplicates, their similarity) among rows of 0 and 1; a row without entries is like none.

    In a bucket of the hash table each text is compared with the next one only: of many copies of a text not every
    pair is listed, but every copy is in one.
    """
    filled = np.flatnonzero(np.diff(sets.indptr))
    if len(filled) < 2:
        return np.zeros((0, 2), np.int64), np.zeros(0)
    rows = csr_array(sets[filled])
    rng = np.random.default_rng(0)
    candidates = [_neighbours(_signatures(rows, rng)) for _ in range(_BANDS)]
    pairs = np.unique(np.concatenate(candidates), axis=0)
    similarity = jaccard(rows, pairs[:, 0], pairs[:, 1])
    near = similarity >= THRESHOLD
    return filled[pairs[near]], similarity[near]


def jaccard(sets: csr_array, first: Int[np.ndarray, "P"], second: Int[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
    """|A and B| / |A or B| of rows of 0 and 1; 0 where both are empty."""
    size = np.diff(sets.indptr)
    common = np.zeros(len(first))
    for start in range(0, len(first), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        common[part] = np.asarray(sets[first[part]].multiply(sets[second[part]]).sum(axis=1)).ravel()
    either = size[first] + size[second] - common
    return np.divide(common, either, out=np.zeros(len(first)), where=either > 0)


def _signatures(rows: csr_array, rng: np.random.Generator) -> Int[np.ndarray, "texts R"]:
    """Per text the least value of each of _ROWS hash functions over its words."""
    columns = rows.indices.astype(np.int64)
    least = []
    for _ in range(_ROWS):
        scale, shift = rng.integers(1, _PRIME), rng.integers(_PRIME)
        least.append(np.minimum.reduceat((scale * columns + shift) % _PRIME, rows.indptr[:-1]))
    return np.stack(least, axis=1)


def _neighbours(signatures: Int[np.ndarray, "texts R"]) -> Int[np.ndarray, "P 2"]:
    """Pairs (smaller, larger) of texts with the same signature that are next to each other in its bucket."""
    order = np.lexsort(signatures.T)
    same = (signatures[order[1:]] == signatures[order[:-1]]).all(axis=1)
    return np.sort(np.stack([order[:-1][same], order[1:][same]], axis=1), axis=1)
