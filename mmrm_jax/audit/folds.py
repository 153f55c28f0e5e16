"""Which comparisons are held out together."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

FOLDS = 5


def balanced_folds(labels: Int[np.ndarray, "C"], folds: int, rng: np.random.Generator) -> Int[np.ndarray, "C"]:
    """A fold per comparison, the same for all of one label: labels go, the most frequent first, where there is least.

    Labels of the same size are taken in random order. There are as many folds as labels where these are fewer.
    """
    found, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shuffled = rng.permutation(len(found))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    load = np.zeros(min(folds, len(found)), np.int64)
    fold = np.zeros(len(found), np.int64)
    for label in order:
        fold[label] = np.argmin(load)
        load[fold[label]] += counts[label]
    return fold[inverse]
