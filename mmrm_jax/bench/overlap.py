"""What of a benchmark training files hold: its images by their bytes, its answers word for word."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mmrm_jax.bench.readers import Item
from mmrm_jax.data.records import DataError, nothing_usable, split_format
from mmrm_jax.data.sources import image_identities
from mmrm_jax.eval.score import open_rows
from mmrm_jax.types import Quarantined


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training files show: `image_identities` of their rows, and all their answers.

    `unread` are the rows that could not be read whole: their images are lacking here, and answers that cannot be told.
    """

    images: set[str]
    answers: set[str]
    unread: list[Quarantined]


def read_trained(specs: Sequence[str]) -> Trained:
    """What the training files hold, each FILE or DIRECTORY:SPLIT, or several joined by "+".

    Image paths are relative to each file's own folder. Raises DataError where a file cannot be read, or no row of it.
    """
    hashes: dict[Path, str] = {}
    found = Trained(set(), set(), [])
    for spec in specs:
        for part in [spec] if Path(spec).exists() else spec.split("+"):
            read = _read(part, hashes)
            found.images.update(read.images)
            found.answers.update(read.answers)
            found.unread.extend(read.unread)
    return found


def _read(spec: str, hashes: dict[Path, str]) -> Trained:
    source, rows = open_rows(spec, None)
    images: set[str] = set()
    answers: set[str] = set()
    unread: list[Quarantined] = []
    for row in rows:
        if row is None or row.group is not None:
            continue
        answers |= {line["response"] for line in row.lines if isinstance(line.get("response"), str)}
        first = row.lines[0]
        unread.append(Quarantined(row.file, row.row, first["error"], first.get("id")))
    for i in range(len(source)):
        group = source[i]
        answers |= set(group.responses)
        try:
            images |= set(image_identities(group, hashes))
        except DataError as error:
            unread.append(Quarantined(group.file, group.row, f"unreadable image: {error}", group.id))
    if not images and not answers:
        raise nothing_usable(split_format(spec)[0], unread)
    return Trained(images, answers, unread)


def overlap(items: Sequence[Item], known: Sequence[Sequence[str]], trained: Trained) -> list[dict[str, bool]]:
    """For each pair whether the training files show one of its images, and whether they hold one of its answers."""
    return [
        {
            "image": not trained.images.isdisjoint(names),
            "answer": not trained.answers.isdisjoint(item.group.responses),
        }
        for item, names in zip(items, known, strict=True)
    ]
