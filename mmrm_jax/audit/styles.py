"""Styles of a response that a text-only model can see, as counts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

_FLAGS = re.IGNORECASE | re.MULTILINE
# What is counted: name, pattern, what to say of a response that has more of it.
_PATTERNS = (
    (
        "hedging",
        r"\b(?:maybe|perhaps|possibly|probably|presumably|apparently|likely|might|may|could|seems?|seemingly|appears?"
        r"|somewhat|roughly|unclear|uncertain|not (?:sure|certain)|i (?:think|believe|guess)|it is possible)\b",
    ),
    ("lists and markdown", r"^\s*(?:[-*•]|\d+[.)]|#{1,6})\s|^\s*\||\*\*|`"),
    ("digits", r"\d"),
    ("first person", r"\b(?:i|me|my|mine|myself|we|our|ours)\b"),
    ("exclamation marks", r"!"),
    ("question marks", r"\?"),
    (
        "refusals",
        r"\bsorry\b|\bapologi[sz]e|\bas an? (?:ai|language model)\b"
        r"|\bi(?:'m|’m| am)? (?:can(?:not|'t|’t)|unable to|not able to)\b",
    ),
)
LENGTHS = ("characters", "words")
STYLES = (*LENGTHS, *(name for name, _ in _PATTERNS))


def count_styles(texts: Sequence[str], words: Int[np.ndarray, "texts"]) -> Int[np.ndarray, "texts S"]:
    """How much of each of STYLES every text has."""
    patterns = [re.compile(pattern, _FLAGS) for _, pattern in _PATTERNS]
    rows = [[len(text), n, *(len(p.findall(text)) for p in patterns)] for text, n in zip(texts, words, strict=True)]
    return np.asarray(rows, np.int64).reshape(-1, len(STYLES))


def style_rows(
    styles: Int[np.ndarray, "texts S"], chosen: Int[np.ndarray, "C"], rejected: Int[np.ndarray, "C"]
) -> csr_array:
    """Features chosen - rejected: for each style which of the two has more, and the difference of log(1 + count)."""
    more = np.sign(styles[chosen] - styles[rejected])
    logs = np.log1p(styles)
    rows = np.concatenate([more, logs[chosen] - logs[rejected]], axis=1).astype(np.float64)
    scale = np.sqrt(np.mean(rows**2, axis=0, keepdims=True)) if len(rows) else 1.0
    return csr_array(np.divide(rows, scale, out=np.zeros_like(rows), where=np.asarray(scale) > 0))


def agreement_columns(more: Int[np.ndarray, "C S"]) -> Float[np.ndarray, "C S 2"]:
    """Per comparison and style (1 where the chosen one has more of it, 1 where the two differ)."""
    return np.stack([more > 0, more != 0], axis=-1).astype(np.float64)
