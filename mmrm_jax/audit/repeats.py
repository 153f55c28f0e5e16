"""Comparisons that say the same again, the contrary, or that go round in a circle."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmrm_jax.audit.pairs import Pairs


def repeats(pairs: Pairs) -> dict[str, Any]:
    """Counts of the environment's duplicates, conflicts and cycles, and the ceiling of any text-only model.

    duplicates: comparisons that repeat another one: image, prompt, responses and label.
    conflicts: pairs of responses to one image and prompt that are labelled both ways; `conflicting` counts their
      comparisons, `conflict_errors` those that any model must get wrong.
    cycles: images and prompts in which preferences go round (A over B over C over A), conflicts apart.
    turned: share of the comparisons whose prompt and pair of responses is also labelled the other way, with any image.
    ceiling: the highest accuracy of a model that sees prompt and responses alone, that of each pair's majority; 1
      where no pair is ever turned round. None without comparisons.
    """
    first, second = np.minimum(pairs.chosen, pairs.rejected), np.maximum(pairs.chosen, pairs.rejected)
    forward = pairs.chosen == first
    here = _numbered(pairs.image, pairs.prompt, first, second)
    both = _both_ways(here, forward)
    anywhere = _both_ways(_numbered(pairs.prompt, first, second), forward)
    turned = anywhere.min(axis=1) > 0
    count = len(pairs)
    return {
        "duplicates": int(count - np.count_nonzero(both)),
        "conflicts": int(np.count_nonzero(both.min(axis=1))),
        "conflicting": int(both[both.min(axis=1) > 0].sum()),
        "conflict_errors": int(both.min(axis=1).sum()),
        "cycles": _cycles(pairs, both.min(axis=1)[here] == 0),
        "turned": float(anywhere[turned].sum() / count) if count else None,
        "ceiling": float(anywhere.max(axis=1).sum() / count) if count else None,
    }


def _numbered(*columns: Int[np.ndarray, "C"]) -> Int[np.ndarray, "C"]:
    """A number for each distinct row of the columns."""
    return np.unique(np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1)


def _both_ways(key: Int[np.ndarray, "C"], forward: np.ndarray) -> Int[np.ndarray, "keys 2"]:
    """How often each key is labelled one way and the other."""
    size = int(key.max()) + 1 if len(key) else 0
    ways = (np.bincount(key[way], minlength=size) for way in (forward, ~forward))
    return np.stack([*ways], axis=1)


def _cycles(pairs: Pairs, settled: np.ndarray) -> int:
    """Images and prompts with a cycle among the settled comparisons: a strongly connected component of several."""
    if not settled.any():
        return 0
    place = _numbered(pairs.image, pairs.prompt)[settled]
    nodes = _numbered(np.tile(place, 2), np.concatenate([pairs.chosen[settled], pairs.rejected[settled]]))
    winner, loser = np.split(nodes, 2)
    size = int(nodes.max()) + 1
    graph = coo_array((np.ones(len(winner)), (winner, loser)), shape=(size, size))
    part = connected_components(graph, directed=True, connection="strong")[1]
    return int(np.unique(place[part[winner] == part[loser]]).size)
