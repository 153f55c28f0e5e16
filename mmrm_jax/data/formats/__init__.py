"""One row of a preference file to a validated group.

Each file format is a pure function from a row (a JSON object, or a row of a Parquet file) to what it asks and answers,
listed in `FORMATS` and recognised by its fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

from mmrm_jax.data.formats import pairs, turns
from mmrm_jax.data.formats.fields import (
    Judged,
    Origin,
    Record,
    Row,
    RowError,
    found,
    guess,
    make_group,
    spelt,
    type_name,
)
from mmrm_jax.data.formats.pairs import PAIR, judge_pair
from mmrm_jax.data.formats.vlfeedback import judge_vlfeedback, read_vlfeedback
from mmrm_jax.types import Group


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The group of a row, and a reason for each of the row's comparisons and responses that was left out of it."""

    group: Group
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format: what it is called, the fields that identify it, and the functions that read a row.

    A row is of the format if it has all `fields`, a value in one of `one_of`, where there are any, and passes `also`.
    `read` says what the row asks and answers, `judge` which of its responses are compared.
    """

    key: str
    name: str
    fields: tuple[str, ...]
    read: Callable[[Row], Record]
    judge: Callable[[Row, Record], Judged]
    one_of: tuple[str, ...] = ()
    also: Callable[[Row], bool] | None = None

    def missing(self, row: Row) -> list[str]:
        """The fields that a row lacks, spelt for a message; of those of which one is enough, all as one."""
        lacking = [spelt(field, row) for field in self.fields if field not in row]
        if self.one_of and all(row.get(field) is None for field in self.one_of):
            lacking.append(" or ".join(f"'{field}'" for field in self.one_of))
        return lacking


def _by(field: str) -> Callable[[Row, Record], Judged]:
    return functools.partial(pairs.judge_by, field)


_REJECTED = ("rejected_response", "rejected_messages", "rejected_images")

# A row is of the first format that it fits.
FORMATS = (
    Format("vlfeedback", "VLFeedback", ("completions",), read_vlfeedback, judge_vlfeedback),
    Format("povid", "POVID", ("conversations", "rejected_conversations"), turns.read_povid, judge_pair),
    Format("llama-factory", "LLaMA-Factory", ("conversations", *PAIR), turns.read_llama_factory, judge_pair),
    Format("llava", "LLaVA", ("conversations", "output_1", "output_2"), turns.read_llava, _by("preference")),
    Format("ms-swift", "ms-swift", ("messages",), turns.read_ms_swift, judge_pair, one_of=_REJECTED),
    Format(
        "align-anything",
        "align-anything",
        ("question", "response_1", "response_2"),
        pairs.read_align_anything,
        _by("overall_response"),
    ),
    Format("rlaif-v", "RLAIF-V", ("question", *PAIR), pairs.read_rlaif_v, judge_pair),
    Format("rlhf-v", "RLHF-V", ("text", "image"), pairs.read_rlhf_v, judge_pair),
    Format("mm-rlhf", "MM-RLHF", PAIR, pairs.read_mm_rlhf, judge_pair, one_of=("video", "is_tie")),
    Format("trl", "TRL", PAIR, turns.read_trl, judge_pair, also=turns.is_trl),
    Format("pairs", "pairwise preferences", PAIR, pairs.read_pair, judge_pair),
    Format("scoring", "scoring input", ("responses",), pairs.read_scoring, pairs.judge_nothing),
)


def find_format(key: str) -> Format:
    """The format of a name; raises ValueError listing the known ones."""
    keys = [form.key for form in FORMATS]
    if key not in keys:
        close = difflib.get_close_matches(key, keys, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(keys)}"
        raise ValueError(f"there is no format {key!r}{hint}")
    return FORMATS[keys.index(key)]


def parse_row(row: Any, origin: Origin, form: Format | None = None) -> Parsed:
    """The group of a row with its comparisons. Raises RowError for a row that cannot be used.

    The row is read as `form`, or as what its fields say.
    """
    form = format_of(row, form)
    record = form.read(row)
    judged = form.judge(row, record)
    return Parsed(make_group(record, row, origin, judged.responses, judged.comparisons), judged.dropped)


def read_record(row: Any, form: Format | None = None) -> Record:
    """What a row asks and answers, unchecked. Raises RowError where that cannot be told."""
    return format_of(row, form).read(row)


def format_of(row: Any, form: Format | None = None) -> Format:
    """The format of a row: `form`, or what its fields say. Raises RowError where the fields are not those of one."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(
            f"not an object: the row is a JSON {type_name(row)}; it must be one object with named fields, "
            'such as {"prompt": ...}'
        )
    if form is not None:
        if missing := form.missing(row):
            raise RowError(f"missing field: {form.name} needs {' and '.join(missing)}; fields found: {found(row)}")
        return form
    for each in FORMATS:
        if not each.missing(row) and (each.also is None or each.also(row)):
            return each
    raise RowError(_unknown_format(row))


def _unknown_format(row: Row) -> str:
    """Say which fields were found, which known format is nearest and what it lacks."""

    def likeness(form: Format) -> float:
        conditions = len(form.fields) + bool(form.one_of) + (form.also is not None)
        return sum(guess(field, row) is not None for field in form.fields) / conditions

    nearest = max(FORMATS, key=likeness)
    missing = " and ".join(nearest.missing(row))
    return (
        f"unknown format: fields found: {found(row)}; the nearest format is {nearest.name}, which also needs {missing}"
    )
