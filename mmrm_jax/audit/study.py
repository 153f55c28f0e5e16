"""One environment: what its text gives away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from mmrm_jax.audit.baselines import (
    accuracy_by_text,
    accuracy_by_unit,
    fit_words,
    folds_of,
    held_out_length,
    held_out_texts,
    held_out_words,
)
from mmrm_jax.audit.features import Words
from mmrm_jax.audit.pairs import Pairs, occurrences
from mmrm_jax.audit.styles import LENGTHS, STYLES, agreement_columns
from mmrm_jax.eval.metrics import correctness, interval, named_rng

MIN_UNITS = 10  # from fewer nothing is concluded
# From this share of comparisons on whose responses other images have too, texts are held out and resampled as well.
REPEATED = 0.05
WORDS, NEW_TEXTS = "bag of words", "bag of words, new texts"


@dataclasses.dataclass(frozen=True)
class Study:
    """What was found in one environment.

    Attributes:
      pairs: the environment.
      result: the same as JSON: counts, baselines, share, styles.
      margins: [C] held-out margins of the bag of words, or None where there is too little data.
      weights: of the bag of words fitted to all comparisons, or None.
    """

    pairs: Pairs
    result: dict[str, Any]
    margins: Float[np.ndarray, "C"] | None
    weights: Float[np.ndarray, "F"] | None


def study(
    pairs: Pairs,
    words: Words,
    styles: Int[np.ndarray, "texts S"],
    progress: Callable[[str, Iterable], Iterable] = lambda name, items: items,
) -> Study:
    """Baselines on held-out comparisons, the share that text explains, and styles; the same numbers in every run."""
    rng = named_rng("audit", pairs.name)
    found = occurrences(pairs)
    by_text = found["repeated"] >= REPEATED
    more = styles[pairs.chosen] - styles[pairs.rejected]
    fold = folds_of(pairs.unit, rng)
    margins = weights = None
    baselines: list[dict[str, Any]] = []
    if fold is not None:
        differences = difference_rows(words, pairs)
        lengths = [held_out_length(more[:, i], fold) for i in range(len(LENGTHS))]
        named = {f"length in {name}": margin for name, margin in zip(LENGTHS, lengths, strict=True)}
        baselines += _measured(named, pairs, by_text, rng)
        for i, row in enumerate(baselines):
            row["direction"] = _direction(more[:, i])
        margins = held_out_words(differences, fold)
        baselines += _measured({WORDS: margins}, pairs, False, rng)
        if by_text:
            new = held_out_texts(
                differences, pairs.chosen, pairs.rejected, pairs.unit, rng, lambda items: progress(pairs.name, items)
            )
            baselines += _measured({NEW_TEXTS: new}, pairs, True, rng)
        weights = fit_words(differences)
    result = {
        "name": pairs.name,
        "data": pairs.spec,
        "groups": pairs.groups,
        "groups_with_image": pairs.images,
        "comparisons": len(pairs),
        "ties": pairs.ties,
        "units": int(np.unique(pairs.unit).size),
        "folds": 0 if fold is None else int(fold.max()) + 1,
        "responses": found,
        "baselines": [{k: v for k, v in row.items() if k != "draws"} for row in baselines],
        "shortcut": shortcut_share(baselines),
        "styles": _styles(more, pairs, by_text, rng),
    }
    return Study(pairs, result, margins, weights)


def difference_rows(words: Words, pairs: Pairs) -> csr_array:
    """TF-IDF of the chosen responses minus that of the rejected, [C, n-grams]."""
    return csr_array(words.tfidf[pairs.chosen] - words.tfidf[pairs.rejected])


def shortcut_share(baselines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The share of comparisons that text explains beyond chance, max(0, 2 accuracy - 1), of the surest baseline.

    If text decided a share s and the rest were guessed, accuracy would be s + (1 - s) / 2. It is a lower bound of what
    text can do: a better text-only model finds more. The surest baseline is the one whose interval begins highest; as
    it is picked among several, the interval is widened as Bonferroni has it, so that 95 % holds for all together.
    `above` says whether it lies above chance. None where no baseline has an interval.
    """
    tail = 2.5 / max(1, len(baselines))
    found = [(interval(row["draws"], tail), row) for row in baselines]
    defined = [(bounds[0], bounds[1], row) for bounds, row in found if bounds[0] is not None and bounds[1] is not None]
    if not defined:
        return None
    low, high, best = max(defined, key=lambda each: each[0])
    share, share_low, share_high = (max(0.0, 2 * value - 1) for value in (best["accuracy"], low, high))
    return {"baseline": best["name"], "share": share, "low": share_low, "high": share_high, "above": low > 0.5}


def _measured(
    margins: dict[str, Float[np.ndarray, "C"]], pairs: Pairs, by_text: bool, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A row per baseline: its accuracy with an interval, and the resamples it comes from."""
    columns = np.stack([np.stack([correctness(m), np.ones(len(m))], axis=-1) for m in margins.values()], axis=1)
    draws = _resampled(columns, pairs, by_text, rng)
    rows = []
    for i, name in enumerate(margins):
        low, high = interval(draws[1:, i])
        resampled = "texts" if by_text else "images"
        accuracy = float(draws[0, i])
        row = {"name": name, "accuracy": accuracy, "low": low, "high": high, "resampled": resampled}
        rows.append(row | {"draws": draws[1:, i]})
    return rows


def _resampled(
    columns: Float[np.ndarray, "C J 2"], pairs: Pairs, by_text: bool, rng: np.random.Generator
) -> Float[np.ndarray, "B J"]:
    if by_text:
        return accuracy_by_text(columns, pairs.chosen, pairs.rejected, rng)
    return accuracy_by_unit(columns, pairs.unit, rng)


def _direction(longer: Int[np.ndarray, "C"]) -> str:
    """Which one wins more often."""
    return {1: "longer", -1: "shorter", 0: "neither"}[int(np.sign(np.sign(longer).sum()))]


def _styles(
    more: Int[np.ndarray, "C S"], pairs: Pairs, by_text: bool, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Per style: in how many comparisons the two differ, and how often the chosen one has more of it there."""
    if not len(pairs):
        return []
    draws = _resampled(agreement_columns(more), pairs, by_text, rng)
    rows = []
    for i, name in enumerate(STYLES):
        low, high = interval(draws[1:, i])
        n = int(np.count_nonzero(more[:, i]))
        agreement = float(draws[0, i]) if n else None
        rows.append({"style": name, "n": n, "agreement": agreement, "low": low, "high": high})
    return rows
