"""Texts as sparse counts of their words and word pairs, weighted by TF-IDF."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

# Words with what stands behind an apostrophe, and single characters of scripts written without spaces.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"(?u)[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’][^\W{_UNSPACED}]+)*"
_ALL = 1000  # of fewer texts every n-gram is kept, of more those that two of them have


@dataclasses.dataclass(frozen=True)
class Words:
    """The n-grams of some texts.

    Attributes:
      sets: [texts, all n-grams] 1 where the text has the n-gram.
      names: of the columns of `tfidf`.
      present: [texts, n-grams] 1 where the text has it.
      tfidf: [texts, n-grams] rows of length 1.
      lengths: [texts] words of each.
    """

    sets: csr_array
    names: np.ndarray
    present: csr_array
    tfidf: csr_array
    lengths: np.ndarray


def count_words(texts: Sequence[str]) -> Words:
    """Words and word pairs in lower case; vocabulary and IDF are of the texts, and know no labels."""
    counter: Any = CountVectorizer(ngram_range=(1, 2), token_pattern=_WORD, dtype=np.float64)  # type: ignore[arg-type]
    try:
        counts = csr_array(counter.fit_transform(texts))
    except ValueError:  # no text has a word
        empty = csr_array((len(texts), 0))
        return Words(empty, np.asarray([], object), empty, empty, np.zeros(len(texts), np.int64))
    names = counter.get_feature_names_out()
    single = np.asarray([" " not in name for name in names])
    lengths = np.asarray(counts @ single.astype(np.float64)).astype(np.int64)
    sets = csr_array((np.ones_like(counts.data), counts.indices, counts.indptr), shape=counts.shape)
    frequent = np.flatnonzero(np.asarray(sets.sum(axis=0)).ravel() >= (1 if len(texts) < _ALL else 2))
    kept = csr_array(counts[:, frequent])
    tfidf = csr_array(TfidfTransformer(sublinear_tf=True).fit_transform(kept)) if frequent.size else kept
    return Words(sets, names[frequent], csr_array(sets[:, frequent]), tfidf, lengths)
