"""Rows of the public reward benchmarks: which of two answers is better, and what category they count for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mmrm_jax.data.formats.fields import (
    Field,
    Origin,
    Record,
    Row,
    RowError,
    check_list,
    check_response,
    identity,
    make_group,
    pictures,
    spelt,
    take,
)
from mmrm_jax.data.records import DataError, read_rows, split_format
from mmrm_jax.types import Comparison, Group, Quarantined

VIDEO = "video: only images are read"


@dataclasses.dataclass(frozen=True)
class Item:
    """A pair of a benchmark: its group has one comparison; `question` is what pairs of one question share."""

    group: Group
    category: str
    question: str


@dataclasses.dataclass(frozen=True)
class Read:
    """What a row asks, the better of its two answers, its category and the name of its question, still unchecked."""

    record: Record
    better: int
    category: str
    question: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A public benchmark: its fields, how a row is read, whether every pair of a question must be right for Acc+.

    `marks` says of a row with these fields whether it is this benchmark's, where they are those of other files too.
    """

    key: str
    title: str
    fields: tuple[str, ...]
    read: Callable[[Row, Origin], Read]
    note: str
    by_question: bool = False
    marks: Callable[[Row], bool] = lambda row: True


def read_vl_rewardbench(row: Row, origin: Origin) -> Read:
    """`id, query, response[2], image, human_ranking`, 0 for the better; the id says the group."""
    answers = check_list(take(row, "response"), "answers")
    ranks = check_list(take(row, "human_ranking"), "ranks")
    if len(answers) != 2 or sorted(ranks, key=repr) not in ([0, 1], [1, 2]):
        raise RowError(f"no pair: 'response' has {len(answers)}, 'human_ranking' is {ranks!r:.40}; [0, 1] is the first")
    fields = tuple(Field(f"response[{i}]", answer) for i, answer in enumerate(answers))
    name = identity(row, origin)
    return Read(Record(take(row, "query"), pictures(row), fields), ranks.index(min(ranks)), vl_group(name), name)


def vl_group(name: str) -> str:
    """The group of VL-RewardBench that an id belongs to."""
    lower = name.lower()
    if any(word in lower for word in ("mathverse", "mmmu")):
        return "reasoning"
    return "hallucination" if any(word in lower for word in ("hallucination", "rlhf", "rlaif")) else "general"


def read_multimodal_rewardbench(row: Row, origin: Origin) -> Read:
    """`ID, Text, Image, Output1, Output2, Better, Category`; Text may be missing where the image asks."""
    outputs = ("Output1", "Output2")
    better = take(row, "Better").value
    if better not in outputs:
        raise RowError(f"wrong value: 'Better' is {better!r:.50}; it must be Output1 or Output2")
    text = Field("Text", row.get("Text") or "")
    image = () if row.get("Image") is None else (Field("Image", row["Image"]),)
    name = _name(row, origin)
    record = Record(text, image, tuple(take(row, output) for output in outputs))
    return Read(record, outputs.index(better), str(row.get("Category") or "other"), name)


def read_mm_rlhf_rewardbench(row: Row, origin: Origin) -> Read:
    """`id, image | video, prompt, chosen, rejected`; the image's folder says the category."""
    if row.get("video"):
        raise RowError(VIDEO)
    record = Record(take(row, "prompt"), pictures(row), (take(row, "chosen"), take(row, "rejected")))
    return Read(record, 0, mm_rlhf_category(row) or "other", identity(row, origin))


def mm_rlhf_category(row: Row) -> str | None:
    """The category that the path of a row's image names, if it does."""
    image = row.get("image")
    path = image.get("path") if isinstance(image, dict) else image
    parts = PurePosixPath(path if isinstance(path, str) else "").parts
    words = (word for part in parts for word in ("mcq", "long", "short", "safety") if word in part.lower())
    return next(words, None)


def _name(row: Row, origin: Origin) -> str:
    """The row's `ID` or `id`, or else its file and row."""
    return identity({**row, "id": row["ID"]} if "ID" in row else row, origin)


CHANCE = "Guessing gives 50 %."
BENCHMARKS = (
    Benchmark(
        "vl-rewardbench",
        "VL-RewardBench",
        ("query", "response", "human_ranking"),
        read_vl_rewardbench,
        f"{CHANCE} Its authors report 65.4 % for GPT-4o, and open models near chance (arXiv 2411.17451). It draws on "
        "POVID, RLHF-V, RLAIF-V and VLFeedback: a model trained on these has seen some of its images.",
    ),
    Benchmark(
        "multimodal-rewardbench",
        "Multimodal RewardBench",
        ("Output1", "Output2", "Better"),
        read_multimodal_rewardbench,
        f"{CHANCE} Its authors report 72 % for the best models that they tried (arXiv 2502.14191).",
    ),
    Benchmark(
        "mm-rlhf-rewardbench",
        "MM-RLHF-RewardBench",
        ("prompt", "chosen", "rejected"),
        read_mm_rlhf_rewardbench,
        f"{CHANCE} Acc+ asks for every pair of a question, so guessing gives less. Of its 170 rows intervals are wide.",
        by_question=True,
        marks=lambda row: bool(row.get("video") or mm_rlhf_category(row)),
    ),
)


def find_benchmark(key: str) -> Benchmark:
    """The benchmark of a name; raises ValueError listing the known ones."""
    for each in BENCHMARKS:
        if each.key == key:
            return each
    raise ValueError(f"there is no benchmark {key!r}; known: {', '.join(each.key for each in BENCHMARKS)}")


def read_benchmark(
    path: Path, image_root: Path | None, key: str | None = None
) -> tuple[Benchmark, list[Item], list[Quarantined]]:
    """The benchmark of a file, told from the fields of its first row unless `key` names it, its pairs, and what is left
    out of it, row by row. Raises DataError where no row can be used."""
    path, _ = split_format(path)
    rows = list(read_rows(path))
    benchmark = find_benchmark(key) if key is not None else _told(path, rows)
    root = path.parent if image_root is None else image_root
    items: list[Item] = []
    left_out: list[Quarantined] = []
    for number, row in rows:
        origin = Origin(path, number, root, benchmark.key)
        try:
            items.append(_item(benchmark, row, origin))
        except RowError as error:
            name = _name(row, origin) if isinstance(row, dict) else None
            left_out.append(Quarantined(str(path), number, str(error), name))
    if not items:
        reason = f"; first reason: {left_out[0].reason}" if left_out else ""
        raise DataError(f"{path} has no row of {benchmark.title} that can be used{reason}", left_out)
    return benchmark, items, left_out


def _told(path: Path, rows: list[tuple[int, Any]]) -> Benchmark:
    objects = [row for _, row in rows if isinstance(row, dict)]
    first = next(iter(objects), {})
    named = [each for each in BENCHMARKS if all(field in first for field in each.fields)]
    for each in named:
        if any(map(each.marks, objects)):
            return each
    if named:
        raise DataError(
            f"{path} has the fields of {named[0].title}, but no image's path names one of its categories: if it is "
            f"that, say so (--name {named[0].key}); the accuracy on preference files is what `mmrm evaluate` gives"
        )
    wanted = "; ".join(f"{each.key}: {', '.join(each.fields)}" for each in BENCHMARKS)
    raise DataError(f"{path} is no benchmark that is known: its fields are {', '.join(first) or 'none'}. {wanted}")


def _item(benchmark: Benchmark, row: Any, origin: Origin) -> Item:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("not an object: a row must be one object with named fields")
    if missing := [spelt(field, row) for field in benchmark.fields if field not in row]:
        raise RowError(f"missing field: {benchmark.title} needs {' and '.join(missing)}")
    read = benchmark.read(row, origin)
    responses = tuple(check_response(field) for field in read.record.responses)
    comparison = Comparison(read.better, 1 - read.better)
    group = make_group(read.record, {**row, "id": read.question}, origin, responses, (comparison,))
    return Item(group, read.category, read.question)
