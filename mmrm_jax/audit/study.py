"""One environment: what its text gives away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from mmrm_jax.audit.baselines import (
    accuracy_by_text,
    accuracy_by_unit,
    fit_linear,
    folds_of,
    held_out_length,
    held_out_linear,
    held_out_texts,
)
from mmrm_jax.audit.features import Words
from mmrm_jax.audit.pairs import Pairs, by_appearance, occurrences
from mmrm_jax.audit.styles import LENGTHS, STYLES, agreement_columns, style_rows
from mmrm_jax.eval.metrics import MIN_CLUSTERS, correctness, interval, named_rng

# From this share of comparisons on whose responses other images have too, texts are held out and resampled as well.
REPEATED = 0.05
STYLE, WORDS, NEW_TEXTS = "length and style", "bag of words", "bag of words, new texts"


@dataclasses.dataclass(frozen=True)
class Study:
    """What was found in one environment.

    Attributes:
      pairs: the environment.
      result: the same as JSON: counts, baselines, share, styles.
      margins: [C] held-out margins of the surest baseline, or None where there is too little data.
      weights: of the bag of words fitted to all comparisons, or None.
    """

    pairs: Pairs
    result: dict[str, Any]
    margins: Float[np.ndarray, "C"] | None
    weights: Float[np.ndarray, "F"] | None

    @property
    def by_text(self) -> bool:
        """Whether texts are resampled, since so many come back with other images."""
        return self.result["responses"]["repeated"] >= REPEATED


def study(
    pairs: Pairs,
    words: Words,
    styles: Int[np.ndarray, "texts S"],
    progress: Callable[[str, Iterable], Iterable] = lambda name, items: items,
) -> Study:
    """Baselines on held-out comparisons, the share that text explains, and styles.

    What is drawn depends neither on an environment's name nor on which others are audited beside it; these have a part
    in the words' IDF only.
    """
    rng = named_rng("audit")
    found = occurrences(pairs)
    by_text = found["repeated"] >= REPEATED
    more = styles[pairs.chosen] - styles[pairs.rejected]
    fold = folds_of(pairs.unit, rng)

    def show(fits: Iterable) -> Iterable:
        return progress(pairs.name, fits)

    margins: dict[str, np.ndarray] = {}
    weights = None
    baselines: list[dict[str, Any]] = []
    if fold is not None:
        differences = difference_rows(words, pairs)
        margins = {f"length in {name}": held_out_length(more[:, i], fold) for i, name in enumerate(LENGTHS)}
        margins[STYLE] = held_out_linear(style_rows(styles, pairs.chosen, pairs.rejected), fold)
        margins[WORDS] = held_out_linear(differences, fold, show)
        if by_text:
            chosen, rejected = _own_texts(pairs)
            margins[NEW_TEXTS] = held_out_texts(differences, chosen, rejected, pairs.unit, rng, show)
        for name, values in margins.items():
            baselines.append(_measured(name, values, pairs, by_text and name != WORDS, rng))
        for i, row in enumerate(baselines[: len(LENGTHS)]):
            row["direction"] = _direction(more[:, i])
        weights = fit_linear(differences)
    share = shortcut_share(baselines)
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
        "shortcut": share,
        "styles": _styles(more, pairs, by_text, rng),
    }
    return Study(pairs, result, margins[share["baseline"]] if share else None, weights)


def words_tell(result: Mapping[str, Any]) -> bool:
    """Whether a bag of words is better than guessing, so that its weights mean something."""
    lows = [row["low"] for row in result["baselines"] if row["name"] in (WORDS, NEW_TEXTS)]
    return any(low is not None and low > 0.5 for low in lows)


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
    name: str, margins: Float[np.ndarray, "C"], pairs: Pairs, by_text: bool, rng: np.random.Generator
) -> dict[str, Any]:
    """A baseline's accuracy with an interval, and the resamples it comes from."""
    columns = np.stack([correctness(margins), np.ones(len(margins))], axis=-1)[:, None]
    draws = resampled(columns, pairs, by_text, rng)[:, 0]
    low, high = interval(draws[1:])
    row = {"name": name, "accuracy": float(draws[0]), "low": low, "high": high}
    row["resampled"] = "texts" if by_text else "images"
    return row | {"draws": draws[1:]}


def resampled(
    columns: Float[np.ndarray, "C J 2"],
    pairs: Pairs,
    by_text: bool,
    rng: np.random.Generator,
    only: Int[np.ndarray, "C"] | slice = slice(None),
) -> Float[np.ndarray, "B J"]:
    """Ratios of J (points, count) columns of some of an environment's comparisons, as `accuracy_by_unit` has them."""
    if by_text:
        chosen, rejected = _own_texts(pairs)[:, only]
        return accuracy_by_text(columns, chosen, rejected, rng)
    return accuracy_by_unit(columns, pairs.unit[only], rng)


def _own_texts(pairs: Pairs) -> Int[np.ndarray, "2 C"]:
    """The chosen and the rejected text of every comparison, numbered within the environment."""
    return by_appearance(np.concatenate([pairs.chosen, pairs.rejected])).reshape(2, -1)


def _direction(longer: Int[np.ndarray, "C"]) -> str:
    """Which one wins more often."""
    return {1: "longer", -1: "shorter", 0: "neither"}[int(np.sign(np.sign(longer).sum()))]


def _styles(
    more: Int[np.ndarray, "C S"], pairs: Pairs, by_text: bool, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Per style: in how many comparisons the two differ, and how often the chosen one has more of it there."""
    if not len(pairs):
        return []
    draws = resampled(agreement_columns(more), pairs, by_text, rng)
    rows = []
    enough = len(np.unique(pairs.unit)) >= MIN_CLUSTERS
    for i, name in enumerate(STYLES):
        low, high = interval(draws[1:, i]) if enough else (None, None)
        n = int(np.count_nonzero(more[:, i]))
        agreement = float(draws[0, i]) if n else None
        rows.append({"style": name, "n": n, "agreement": agreement, "low": low, "high": high})
    return rows
