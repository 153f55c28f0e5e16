"""The comparisons of several data sets as index arrays: which texts, images and prompts each of them has.

Dimension key beside the package's: C comparisons of an environment, ties left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmrm_jax.data.sources import GroupSource, group_identity

# A prompt asked of more images than this is a question asked of everything ("Describe the image."), and what shares
# it is not related by it.
PROMPT_IMAGES = 10


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The comparisons of one environment that are no ties; all arrays are [C].

    Attributes:
      name, spec: what it is called, and where it was read from.
      source: its groups.
      group: index of each comparison's group in `source`.
      winner, loser: indices into the group's responses.
      chosen, rejected: indices into `Corpus.texts`.
      image: number of the image's bytes, or of the prompt where there is no image.
      prompt: number of the prompt.
      unit: number of what is held out together: comparisons that are linked by an image, or by a prompt that few
        images share.
      groups, ties: how many groups and ties the data set has.
      images: of how many groups have one.
    """

    name: str
    spec: str
    source: GroupSource
    group: Int[np.ndarray, "C"]
    winner: Int[np.ndarray, "C"]
    loser: Int[np.ndarray, "C"]
    chosen: Int[np.ndarray, "C"]
    rejected: Int[np.ndarray, "C"]
    image: Int[np.ndarray, "C"]
    prompt: Int[np.ndarray, "C"]
    unit: Int[np.ndarray, "C"]
    groups: int
    ties: int
    images: int

    def __len__(self) -> int:
        return len(self.group)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Several environments, and the distinct responses and prompts that they number in common."""

    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    environments: tuple[Pairs, ...]


def index_comparisons(
    named: Sequence[tuple[str, str, GroupSource]],
    progress: Callable[[str, Iterable[int]], Iterable[int]] = lambda name, indices: indices,
) -> Corpus:
    """Number the texts, images and prompts of (name, spec, source) triples, each source read once.

    Raises DataError where an image cannot be read.
    """
    texts: dict[str, int] = {}
    prompts: dict[tuple[str, ...], int] = {}
    shown_prompts: list[str] = []
    images: dict[str, int] = {}
    known: dict[Path, str] = {}
    read = []
    for name, _, source in named:
        rows: list[tuple[int, ...]] = []
        ties = shown = 0
        for index in progress(name, range(len(source))):
            group = source[index]
            shown += group.image is not None
            ties += sum(c.tie for c in group.comparisons)
            judged = [c for c in group.comparisons if not c.tie]
            if not judged:
                continue
            numbers = [texts.setdefault(text, len(texts)) for text in group.responses]
            image = images.setdefault(group_identity(group, known), len(images))
            prompt = prompts.setdefault(group.turns, len(prompts))
            if prompt == len(shown_prompts):
                shown_prompts.append(group.asked)
            rows += [(index, c.winner, c.loser, numbers[c.winner], numbers[c.loser], image, prompt) for c in judged]
        read.append((np.asarray(rows, np.int64).reshape(-1, 7).T, ties, shown))
    fields = ("group", "winner", "loser", "chosen", "rejected", "image", "prompt")
    environments = [
        Pairs(
            name,
            spec,
            source,
            **dict(zip(fields, columns, strict=True)),
            unit=linked(columns[5], columns[6]),
            groups=len(source),
            ties=ties,
            images=shown,
        )
        for (name, spec, source), (columns, ties, shown) in zip(named, read, strict=True)
    ]
    return Corpus(tuple(texts), tuple(shown_prompts), tuple(environments))


def linked(image: Int[np.ndarray, "C"], prompt: Int[np.ndarray, "C"]) -> Int[np.ndarray, "C"]:
    """A number per comparison that those share which an image links, or a prompt that at most PROMPT_IMAGES have.

    Links go on from one to the next: the numbers are those of the connected components.
    """
    if not len(image):
        return image
    edges = np.unique(np.stack([image, prompt]), axis=1)
    few = np.bincount(edges[1])[edges[1]] <= PROMPT_IMAGES
    offset = int(image.max()) + 1
    size = offset + int(prompt.max()) + 1
    ends = (edges[0][few], offset + edges[1][few])
    graph = coo_array((np.ones(few.sum()), ends), shape=(size, size))
    return by_appearance(connected_components(graph, directed=False)[1][image])


def by_appearance(labels: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The labels as 0, 1, 2 ... in the order of their first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def occurrences(pairs: Pairs) -> dict[str, Any]:
    """How the environment's responses repeat.

    `repeated` is the share of comparisons with a response that other units have too, `balance` the share of those
    responses' appearances that are left when each is counted as chosen minus rejected: 0 where every text is chosen as
    often as it is rejected, 1 where each is always one of them, None where none is repeated.
    """
    text = np.concatenate([pairs.chosen, pairs.rejected])
    if not len(text):
        return {"distinct": 0, "repeated": 0.0, "balance": None}
    met = np.unique(np.stack([text, np.tile(pairs.unit, 2)]), axis=1)
    size = int(text.max()) + 1
    often = np.bincount(met[0], minlength=size) > 1
    chosen, rejected = (np.bincount(side, minlength=size) for side in (pairs.chosen, pairs.rejected))
    total = (chosen + rejected)[often].sum()
    net = np.abs(chosen - rejected)[often].sum()
    return {
        "distinct": int(np.count_nonzero(chosen + rejected)),
        "repeated": float(np.mean(often[pairs.chosen] | often[pairs.rejected])),
        "balance": float(net / total) if total else None,
    }
