"""Rows of a file to what is to be scored: every response, whatever is compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmrm_jax.data.formats import Origin, RowError, check_response, identity, image_field, list_responses, make_group
from mmrm_jax.data.records import DataError, read_rows
from mmrm_jax.types import Group


@dataclasses.dataclass(frozen=True)
class ScoringRow:
    """One row of a file (1-based), as the lines of output that it gives, one a response, in order.

    A line has "id", "prompt", "img_path" and "response" as far as they are known, and "error" where the response cannot
    be scored. `group` holds the other responses, in order; it is None where there are none. A row whose responses
    cannot be told has one line, with "file", "row" and "error".
    """

    file: str
    row: int
    lines: tuple[dict[str, Any], ...]
    group: Group | None


def read_scoring(path: Path, image_root: Path | None) -> list[ScoringRow]:
    """Every row of a file in any known format; image paths are relative to `image_root`, by default the file's folder.

    Raises DataError where the file cannot be read or has no rows.
    """
    root = path.parent if image_root is None else image_root
    rows = [scoring_row(row, Origin(path, number, root, path.stem)) for number, row in read_rows(path)]
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def scoring_row(row: Any, origin: Origin) -> ScoringRow:
    """What a row's JSON value, or the RowError in place of one, asks to be scored."""
    file, known = str(origin.file), _known(row, origin)
    try:
        responses = list_responses(row)
        if not responses:
            raise RowError("no responses: there is nothing to score")
    except RowError as error:
        line = known | {"file": file, "row": origin.row, "error": str(error)}
        return ScoringRow(file, origin.row, (line,), None)
    problems = [_problem(field, value) for field, value in responses]
    kept = tuple(value for (_, value), problem in zip(responses, problems, strict=True) if problem is None)
    group = None
    try:
        group = make_group(row, origin, kept, ()) if kept else None
    except RowError as error:
        problems = [problem or str(error) for problem in problems]
    lines = [
        known | _texts({"response": value}) | ({} if problem is None else {"error": problem})
        for (_, value), problem in zip(responses, problems, strict=True)
    ]
    return ScoringRow(file, origin.row, tuple(lines), group)


def row_of_group(group: Group) -> ScoringRow:
    """The row of a group of a prepared data set, in which every response can be scored."""
    place = {"id": group.id, "prompt": group.prompt, "img_path": group.image_name}
    return ScoringRow(group.file, group.row, tuple(place | {"response": r} for r in group.responses), group)


def _known(row: Any, origin: Origin) -> dict[str, Any]:
    if not isinstance(row, dict):
        return {}
    named = {"prompt": "prompt", "img_path": image_field(row)}
    return {"id": identity(row, origin)} | _texts({ours: row[field] for ours, field in named.items() if field in row})


def _texts(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are a text or null: what else a row may hold there need not be JSON, such as NaN."""
    return {name: value for name, value in fields.items() if value is None or isinstance(value, str)}


def _problem(field: str, value: Any) -> str | None:
    try:
        check_response(value, field)
    except RowError as error:
        return str(error)
    return None
