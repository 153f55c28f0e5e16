"""Rows of a file to what is to be scored: every response, whatever is compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmrm_jax.data.formats import Format, read_record
from mmrm_jax.data.formats.fields import (
    Field,
    Origin,
    Record,
    RowError,
    check_response,
    identity,
    image_names,
    make_group,
    pictures,
    take,
)
from mmrm_jax.data.records import DataError, read_rows, split_format
from mmrm_jax.types import Group


@dataclasses.dataclass(frozen=True)
class ScoringRow:
    """One row of a file (1-based), as the lines of output that it gives, one a response, in order.

    A line has "id", "prompt", "img_path" and "response" as far as they are known, "history" where turns come before
    the prompt, and "error" where the response cannot be scored. `group` holds the other responses, in order; it is None
    where there are none. A row whose responses cannot be told has one line, with "file", "row" and "error".
    """

    file: str
    row: int
    lines: tuple[dict[str, Any], ...]
    group: Group | None


def read_scoring(path: Path, image_root: Path | None) -> list[ScoringRow]:
    """Every row of a file in any known format; image paths are relative to `image_root`, by default the file's folder.

    The format may be named, as FILE@FORMAT. Raises DataError where the file cannot be read or has no rows.
    """
    path, form = split_format(path)
    root = path.parent if image_root is None else image_root
    rows = [scoring_row(row, Origin(path, number, root, path.stem), form) for number, row in read_rows(path)]
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def scoring_row(row: Any, origin: Origin, form: Format | None = None) -> ScoringRow:
    """What a row's JSON value, or the RowError in place of one, asks to be scored."""
    file = str(origin.file)
    try:
        record = read_record(row, form)
        if not record.responses:
            raise RowError("no responses: there is nothing to score")
    except RowError as error:
        line = _known_of(row, origin) | {"file": file, "row": origin.row, "error": str(error)}
        return ScoringRow(file, origin.row, (line,), None)
    problems = [_problem(field) for field in record.responses]
    kept = tuple(field.value for field, problem in zip(record.responses, problems, strict=True) if problem is None)
    group = None
    try:
        group = make_group(record, row, origin, kept, ()) if kept else None
    except RowError as error:
        problems = [problem or str(error) for problem in problems]
    known = _known(row, origin, record) | ({} if group is None else {"prompt": group.prompt})
    lines = [
        known | _texts({"response": field.value}) | ({} if problem is None else {"error": problem})
        for field, problem in zip(record.responses, problems, strict=True)
    ]
    return ScoringRow(file, origin.row, tuple(lines), group)


def row_of_group(group: Group) -> ScoringRow:
    """The row of a group of a prepared data set, in which every response can be scored."""
    place: dict[str, Any] = {"id": group.id, "prompt": group.prompt, "img_path": group.image_name}
    place |= {"history": list(group.history)} if group.history else {}
    return ScoringRow(group.file, group.row, tuple(place | {"response": r} for r in group.responses), group)


def _known_of(row: Any, origin: Origin) -> dict[str, Any]:
    """What is known of a row whose responses cannot be told."""
    if not isinstance(row, dict):
        return {}
    return _known(row, origin, Record(take(row, "prompt"), pictures(row), ()))


def _known(row: dict[str, Any], origin: Origin, record: Record) -> dict[str, Any]:
    """The row's id and, as far as the row says, its prompt and the path of its image, or of all of them."""
    names = image_names(record)
    shown = {"img_path": names[0] if len(names) == 1 else names} if names else {}
    if not record.images:
        shown = {"img_path": None}
    before = [field.value for field in record.history]
    said = {"history": before} if before and all(isinstance(text, str) for text in before) else {}
    return {"id": identity(row, origin)} | _texts({"prompt": record.prompt.value}) | said | shown


def _texts(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are a text or null: what else a row may hold there need not be JSON, such as NaN."""
    return {name: value for name, value in fields.items() if value is None or isinstance(value, str)}


def _problem(field: Field) -> str | None:
    try:
        check_response(field)
    except RowError as error:
        return str(error)
    return None
