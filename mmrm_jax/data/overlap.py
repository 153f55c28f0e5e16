"""What the splits of a data set have in common: images, and prompts about them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmrm_jax.data.sources import image_identities
from mmrm_jax.types import Group


@dataclasses.dataclass(frozen=True)
class Seen:
    """A group of a split: where it is from, its images (or, without one, its prompt) as hashes, and its prompt after
    the turns before it."""

    file: str
    row: int
    id: str
    identities: tuple[str, ...]
    prompt: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Two splits that show the same images, or have the same prompt without one.

    `images` is how many; `groups` are those of the second split with one of them, and whether each also has the prompt
    that a group of the first has with the same image.
    """

    first: str
    second: str
    images: int
    groups: tuple[tuple[Seen, bool], ...]


def seen(group: Group, known: dict[Path, str]) -> Seen:
    """A group as `overlaps` takes it; raises DataError where an image cannot be read (see `image_identities`)."""
    return Seen(group.file, group.row, group.id, tuple(image_identities(group, known)), group.turns)


def overlaps(splits: Mapping[str, Sequence[Seen]]) -> list[Overlap]:
    """Every two splits that have an image or, without one, a prompt in common."""
    found = []
    for (first, a), (second, b) in itertools.combinations(splits.items(), 2):
        images = {identity for each in a for identity in each.identities}
        asked = {(identity, each.prompt) for each in a for identity in each.identities}
        again = [
            (each, any((identity, each.prompt) in asked for identity in each.identities))
            for each in b
            if not images.isdisjoint(each.identities)
        ]
        if again:
            shared = images & {identity for each, _ in again for identity in each.identities}
            found.append(Overlap(first, second, len(shared), tuple(again)))
    return found


def describe_overlap(overlap: Overlap) -> str:
    """One line for people."""
    one, same = overlap.groups[0][0], sum(same for _, same in overlap.groups)
    return (
        f"{overlap.first} and {overlap.second} have {overlap.images} image(s), or prompts without one, in common: "
        f"{len(overlap.groups)} group(s) of {overlap.second}, {same} of them with the same prompt "
        f"(first: {one.file} row {one.row})"
    )


def write_overlaps(path: Path, found: Sequence[Overlap]) -> None:
    """Write the groups as JSONL, one `{"split", "file", "row", "id", "also_in", "same_prompt"}` a line."""
    lines = [
        {"split": o.second, "file": s.file, "row": s.row, "id": s.id, "also_in": o.first, "same_prompt": same}
        for o in found
        for s, same in o.groups
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
