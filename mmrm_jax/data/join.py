"""Rows of one image and prompt as one group, whose image and prompt run through the model once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mmrm_jax.data.pipeline import EncodedSource, index_source
from mmrm_jax.data.sources import GroupSource, group_identity
from mmrm_jax.types import Group


@dataclasses.dataclass(frozen=True)
class JoinedSource:
    """The groups of another source, those at `members[i]` as one."""

    source: GroupSource
    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int, /) -> Group:
        return join_groups([self.source[i] for i in self.members[index]])


def join_groups(groups: Sequence[Group]) -> Group:
    """One group with every response once and all comparisons, in order; `file` and `row` are the first's, the ids
    follow one another, and `joined` has them all. All must share prompt, image and environment."""
    responses = tuple(dict.fromkeys(response for group in groups for response in group.responses))
    place = {response: i for i, response in enumerate(responses)}
    comparisons = tuple(
        dataclasses.replace(c, winner=place[group.responses[c.winner]], loser=place[group.responses[c.loser]])
        for group in groups
        for c in group.comparisons
    )
    name = ", ".join(dict.fromkeys(group.id for group in groups))
    rows = tuple((group.file, group.row, group.id) for group in groups)
    return dataclasses.replace(groups[0], id=name, responses=responses, comparisons=comparisons, joined=rows)


def join_rows(data: EncodedSource, most: int) -> EncodedSource:
    """`data` with up to `most` rows of the same image (its bytes), prompt, environment and caption as one group.

    Rows are joined in order, after each has been found to fit on its own. Raises DataError where an image cannot be
    read.
    """
    known: dict[Path, str] = {}
    together: dict[tuple[str, tuple[str, ...], str, str | None], list[list[int]]] = {}
    for index in range(len(data)):
        group = data.group(index)
        same = (group_identity(group, known), group.turns, group.environment, group.caption)
        parts = together.setdefault(same, [[]])
        if len(parts[-1]) == most:
            parts.append([])
        parts[-1].append(data.kept[index])
    members = sorted(tuple(part) for parts in together.values() for part in parts)
    joined, refused = index_source(
        JoinedSource(data.source, tuple(members)), data.processor, data.views, cache=bool(data.cache)
    )
    assert not refused  # each row has been encoded or measured before, and together they are no longer
    return joined
