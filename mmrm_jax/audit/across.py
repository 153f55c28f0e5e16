"""What environments have in common, and whether what text says in one holds in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from mmrm_jax.audit.baselines import MIN_COMPARISONS
from mmrm_jax.audit.features import Words
from mmrm_jax.audit.near import THRESHOLD, jaccard, near_pairs
from mmrm_jax.audit.pairs import Pairs
from mmrm_jax.audit.study import WORDS, Study, difference_rows, resampled
from mmrm_jax.eval.metrics import correctness, interval, named_rng

_EXAMPLES = 3  # pairs of near duplicates shown, per environment


def transfer(studies: Sequence[Study], words: Words) -> list[dict[str, Any]]:
    """Accuracy of the bag of words of every environment on every other; on its own, that of the held-out folds.

    Comparisons that the training environment has too, of the same image, prompt and responses, are not tested on; where
    fewer than MIN_COMPARISONS are left the accuracy is None. Others of the same image are: to leave them out would
    change what the test set is made of, and words do not see the image. Rows {"train", "test", "n", "accuracy", "low",
    "high"}.
    """
    rows = []
    for train in studies:
        if train.weights is None:
            continue
        for test in studies:
            if test is train:
                rows.append(_own(train))
                continue
            apart = np.flatnonzero(~_met(_judged(test.pairs), _judged(train.pairs)))
            margins = difference_rows(words, test.pairs)[apart] @ train.weights
            rows.append(_cell(train.pairs.name, test, margins, apart))
    return rows


def _own(study: Study) -> dict[str, Any]:
    name, found = study.pairs.name, study.result["baselines"]
    row = next(row for row in found if row["name"] == WORDS)
    numbers = {field: row[field] for field in ("accuracy", "low", "high")}
    return {"train": name, "test": name, "n": len(study.pairs)} | numbers


def _cell(train: str, test: Study, margins: Float[np.ndarray, "n"], apart: Int[np.ndarray, "n"]) -> dict[str, Any]:
    name = test.pairs.name
    row: dict[str, Any] = {"train": train, "test": name, "n": len(margins)}
    if len(margins) < MIN_COMPARISONS:
        return row | {"accuracy": None, "low": None, "high": None}
    columns = np.stack([correctness(margins), np.ones(len(margins))], axis=-1)[:, None]
    draws = resampled(columns, test.pairs, test.by_text, named_rng("audit", train, name), apart)[:, 0]
    low, high = interval(draws[1:])
    return row | {"accuracy": float(draws[0]), "low": low, "high": high}


def overlap(environments: Sequence[Pairs], families: Int[np.ndarray, "texts"]) -> list[dict[str, Any]]:
    """Per ordered pair of environments, how much of `of` is also `within` the other.

    Shares of the comparisons of `of` whose image is there, or whose pair of responses is, with the same prompt and in
    either order; shares of its distinct responses that are there, to the letter or nearly.
    """
    rows = []
    for other in environments:
        for of in environments:
            if of is other or not len(of) or not len(other):
                continue
            own, there = texts_of(of), texts_of(other)
            rows.append(
                {
                    "of": of.name,
                    "within": other.name,
                    "images": float(np.isin(of.image, other.image).mean()),
                    "pairs": float(_met(_judged(of)[:, 1:], _judged(other)[:, 1:]).mean()),
                    "responses": float(np.isin(own, there).mean()),
                    "near_responses": float(np.isin(families[own], families[there]).mean()),
                }
            )
    return rows


def texts_of(pairs: Pairs) -> Int[np.ndarray, "T"]:
    """The distinct responses of an environment."""
    return np.unique(np.concatenate([pairs.chosen, pairs.rejected]))


def _judged(pairs: Pairs) -> Int[np.ndarray, "C 4"]:
    """What each comparison is about: image, prompt and the two responses, in no order."""
    both = np.sort(np.stack([pairs.chosen, pairs.rejected], axis=1), axis=1)
    return np.column_stack([pairs.image, pairs.prompt, both])


def _met(rows: Int[np.ndarray, "C J"], others: Int[np.ndarray, "D J"]) -> Bool[np.ndarray, "C"]:
    """Which rows are among the others."""
    key = np.unique(np.concatenate([rows, others]), axis=0, return_inverse=True)[1].reshape(-1)
    return np.isin(key[: len(rows)], key[len(rows) :])


def text_families(sets: csr_array) -> Int[np.ndarray, "texts"]:
    """A number per text that near duplicates share, one to the next."""
    pairs, _ = near_pairs(sets)
    size = sets.indptr.size - 1
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def near_duplicates(pairs: Pairs, texts: Sequence[str], sets: csr_array) -> dict[str, Any]:
    """Distinct responses of an environment that have a near duplicate there, and comparisons of two such.

    `alike` counts the comparisons whose two responses are near duplicates.
    """
    own = texts_of(pairs)
    close, similarity = near_pairs(csr_array(sets[own]))
    order = np.argsort(-similarity, kind="stable")[:_EXAMPLES]
    return {
        "near": len(np.unique(close)),
        "alike": int(np.count_nonzero(jaccard(sets, pairs.chosen, pairs.rejected) >= THRESHOLD)),
        "examples": [
            {"similarity": float(s), "first": texts[int(a)], "second": texts[int(b)]}
            for (a, b), s in zip(own[close[order]], similarity[order], strict=True)
        ],
    }
