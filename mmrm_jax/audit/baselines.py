"""What text alone gets right, on comparisons that were held out.

Four baselines, none of which sees an image: the number of characters, the number of words, and two logistic regressions
on the difference of the two responses, one on their styles and one, a bag of words, on their TF-IDF vectors. These have
no intercept, so that exchanging the responses turns the margin's sign: each is the Bradley-Terry fit of a reward that
is linear in the features. What is held out is always whole units: nothing that shares an image with a test comparison
was seen in training.

Where the same responses come back with other images, an estimate that knows them is one of these very texts, and can
be biased: if each is chosen as often as it is rejected, what a fold takes away tips the rest the other way, and
accuracy falls *below* 1/2 although there is nothing to learn. (Parker, Gunter and Bedo, "Stratification bias in low
signal microarray studies", BMC Bioinformatics 8:326, 2007, describe it for classes.) So a second estimate holds out
texts as well: those of a test comparison occur in none of its training comparisons. It is not biased, and says what
words tell about texts that are new. Its interval resamples texts, a comparison's weight being the product of its two
texts' ("pigeonhole bootstrap": Owen and Eckles, "Bootstrapping data arrays of arbitrary order", Annals of Applied
Statistics 6(3), 2012), which is rather too wide than too narrow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from mmrm_jax.audit.folds import FOLDS, balanced_folds
from mmrm_jax.eval.metrics import RESAMPLES, bootstrap_sums, cluster_sums

MIN_COMPARISONS = 20  # fewer are not fitted, nor tested on
_PENALTY = 1.0  # sklearn's C, its default


def fit_linear(differences: csr_array) -> Float[np.ndarray, "F"]:
    """Weights of the features, from rows chosen - rejected; 0 where there is nothing to fit.

    Every second row is turned round, label and all, since sklearn wants two classes: the loss stays the same.
    """
    rows, columns = differences.shape  # type: ignore[misc]  # the stubs allow for None
    if rows < 2 or not differences.nnz:
        return np.zeros(columns)
    label = np.where(np.arange(rows) % 2 == 0, 1.0, -1.0)
    turned = csr_array(differences.multiply(label[:, None]))
    model = LogisticRegression(C=_PENALTY, fit_intercept=False, max_iter=1000, tol=1e-4)
    return np.asarray(model.fit(turned, label).coef_[0], np.float64)


def held_out_linear(
    differences: csr_array,
    fold: Int[np.ndarray, "C"],
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Float[np.ndarray, "C"]:
    """Margins of the linear fit, each from the other folds."""
    margins = np.zeros(len(fold))
    for k in progress(np.unique(fold)):
        weights = fit_linear(csr_array(differences[np.flatnonzero(fold != k)]))
        margins[fold == k] = differences[np.flatnonzero(fold == k)] @ weights
    return margins


def held_out_texts(
    differences: csr_array,
    chosen: Int[np.ndarray, "C"],
    rejected: Int[np.ndarray, "C"],
    unit: Int[np.ndarray, "C"],
    rng: np.random.Generator,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Float[np.ndarray, "C"]:
    """Margins of the bag of words, each from comparisons that share neither a text nor a unit with it.

    Texts are split into folds; the comparisons between two of these are tested on a fit to all that touch neither.
    What is left with fewer than MIN_COMPARISONS to learn from has margin 0.
    """
    text, both = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
    fold = (rng.permutation(len(text)) % FOLDS)[both].reshape(2, -1)
    low, high = fold.min(axis=0), fold.max(axis=0)
    margins = np.zeros(len(chosen))
    for i, j in progress(list(itertools.combinations_with_replacement(range(FOLDS), 2))):
        test = (low == i) & (high == j)
        train = ~np.isin(fold, (i, j)).any(axis=0) & ~np.isin(unit, unit[test])
        if test.any() and train.sum() >= MIN_COMPARISONS:
            weights = fit_linear(csr_array(differences[np.flatnonzero(train)]))
            margins[test] = differences[np.flatnonzero(test)] @ weights
    return margins


def held_out_length(longer: Int[np.ndarray, "C"], fold: Int[np.ndarray, "C"]) -> Float[np.ndarray, "C"]:
    """Margins of "the longer one wins", or the shorter one, as the other folds have it, from chosen - rejected."""
    margins = np.zeros(len(fold))
    for k in np.unique(fold):
        margins[fold == k] = longer[fold == k] * np.sign(np.sign(longer[fold != k]).sum())
    return margins


def accuracy_by_unit(
    columns: Float[np.ndarray, "C J 2"], unit: Int[np.ndarray, "C"], rng: np.random.Generator
) -> Float[np.ndarray, "B J"]:
    """Ratios of J (points, count) columns, row 0 the sample's own, the rest those of resampled units."""
    return _ratios(bootstrap_sums(cluster_sums(columns, unit, np.unique(unit)), rng))


def accuracy_by_text(
    columns: Float[np.ndarray, "C J 2"],
    chosen: Int[np.ndarray, "C"],
    rejected: Int[np.ndarray, "C"],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, "B J"]:
    """As `accuracy_by_unit`, of resampled texts: a comparison's weight is how often its two were drawn, multiplied."""
    text, both = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
    first, second = both.reshape(2, -1)
    flat = columns.reshape(len(columns), -1)
    totals = [flat.sum(axis=0)]
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(len(text), size=len(text)), minlength=len(text)).astype(np.float64)
        totals.append((drawn[first] * drawn[second]) @ flat)
    return _ratios(np.stack(totals).reshape(resamples + 1, *columns.shape[1:]))


def _ratios(sums: Float[np.ndarray, "B J 2"]) -> Float[np.ndarray, "B J"]:
    points, count = sums[..., 0], sums[..., 1]
    return np.divide(points, count, out=np.full(points.shape, np.nan), where=count > 0)


def folds_of(unit: Int[np.ndarray, "C"], rng: np.random.Generator) -> Int[np.ndarray, "C"] | None:
    """FOLDS folds, or fewer where there are fewer units; None where there is too little to hold anything out."""
    if len(unit) < MIN_COMPARISONS or len(np.unique(unit)) < 2:
        return None
    return balanced_folds(unit, FOLDS, rng)
