"""The words that tell chosen from rejected, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mmrm_jax.audit.features import Words

_SHOWN = 12  # on either side
_FEWEST = 5  # comparisons in which a word tells the two apart
_WEIGHTLESS = 0.01  # weights below are what a fit leaves where nothing is to be learnt


def telling_words(
    words: Words, weights: Float[np.ndarray, "F"], chosen: Int[np.ndarray, "C"], rejected: Int[np.ndarray, "C"]
) -> list[dict[str, Any]]:
    """The n-grams with the largest weights on either side, those that speak for a response first.

    `n` counts the comparisons in which one response has it and the other has not, `accuracy` is how often a rule of
    that word alone is right in these: "prefer the one with it", or without it where the weight is negative. Of n-grams
    that the same texts have, the first is listed.
    """
    found: list[dict[str, Any]] = []
    for sign in (1, -1):
        order = np.argsort(-sign * weights, kind="stable")
        shown = 0
        seen: set[bytes] = set()
        for feature in order[: 20 * _SHOWN]:
            if sign * weights[feature] < _WEIGHTLESS or shown == _SHOWN:
                break
            has = words.present[:, [feature]].toarray().ravel()
            told = has[chosen] - has[rejected]
            n = int(np.count_nonzero(told))
            mark = has.tobytes()
            if n >= _FEWEST and mark not in seen:
                seen.add(mark)
                right = int(np.count_nonzero(told == sign))
                name, weight = str(words.names[feature]), float(weights[feature])
                found.append({"word": name, "weight": weight, "n": n, "accuracy": right / n})
                shown += 1
    return found
