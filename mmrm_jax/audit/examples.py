"""Comparisons to look at: where text is surest, right and wrong."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from mmrm_jax.audit.pairs import Pairs
from mmrm_jax.audit.study import Study

_SHOWN = 3  # of each kind


@dataclasses.dataclass(frozen=True)
class Example:
    """A comparison with the held-out margin of a baseline; `images` are encoded bytes, none of a text-only one."""

    environment: str
    kind: Literal["right", "wrong"]
    baseline: str
    margin: float
    id: str
    row: int
    images: tuple[bytes, ...]
    prompt: str
    chosen: str
    rejected: str


def find_examples(study: Study) -> list[Example]:
    """The comparisons with the largest margins and with the smallest, each text and image once."""
    if study.margins is None:
        return []
    baseline = study.result["shortcut"]["baseline"]
    order = np.argsort(study.margins, kind="stable")
    right = [c for c in order[::-1] if study.margins[c] > 0]
    wrong = [c for c in order if study.margins[c] < 0]
    kinds: tuple[tuple[Literal["right", "wrong"], list], ...] = (("right", right), ("wrong", wrong))
    return [
        _example(study.pairs, int(c), kind, baseline, float(study.margins[c]))
        for kind, found in kinds
        for c in _distinct(study.pairs, np.asarray(found, np.int64))
    ]


def _distinct(pairs: Pairs, order: Int[np.ndarray, "n"]) -> list[int]:
    """The first comparisons that share neither image nor text, as many as are shown."""
    found: list[int] = []
    seen: set[tuple[str, int]] = set()
    for c in order:
        marks = {("image", int(pairs.image[c])), ("text", int(pairs.chosen[c])), ("text", int(pairs.rejected[c]))}
        if not marks & seen:
            found.append(int(c))
            seen |= marks
        if len(found) == _SHOWN:
            break
    return found


def _example(pairs: Pairs, c: int, kind: Literal["right", "wrong"], baseline: str, margin: float) -> Example:
    group = pairs.source[int(pairs.group[c])]
    return Example(
        environment=pairs.name,
        kind=kind,
        baseline=baseline,
        margin=margin,
        id=group.id,
        row=group.row,
        images=group.encoded_images(),
        prompt=group.asked,
        chosen=group.responses[pairs.winner[c]],
        rejected=group.responses[pairs.loser[c]],
    )
