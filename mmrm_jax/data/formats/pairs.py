"""Formats whose rows are flat: a prompt, an image, and two or more responses beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mmrm_jax.data.formats.fields import (
    Field,
    Judged,
    Record,
    Row,
    RowError,
    check_list,
    check_read,
    check_response,
    number,
    pictures,
    take,
    type_name,
)
from mmrm_jax.types import Comparison

PAIR = ("chosen", "rejected")


def read_pair(row: Row) -> Record:
    """The authors' pairs: `id, prompt, img_path, chosen, rejected`; optional `margin` (number) and `tie` (boolean).

    Optional `history` is a list of the texts said before the prompt, by the user and the assistant in turn.
    """
    return Record(take(row, "prompt"), pictures(row), tuple(take(row, name) for name in PAIR), history(row))


def read_scoring(row: Row) -> Record:
    """Scoring input: `prompt, img_path, responses`, and `history` as pairs have it."""
    responses = check_list(take(row, "responses"), "texts")
    named = tuple(Field(f"responses[{i}]", response) for i, response in enumerate(responses))
    return Record(take(row, "prompt"), pictures(row), named, history(row))


def history(row: Row) -> tuple[Field, ...]:
    """The texts of `history`: turns before the prompt, of the user and the assistant; none without such a field."""
    if not row.get("history"):
        return ()
    texts = check_list(take(row, "history"), "texts")
    return tuple(Field(f"history[{i}]", text) for i, text in enumerate(texts))


def read_rlaif_v(row: Row) -> Record:
    """RLAIF-V: `question, chosen, rejected, image {bytes, path}` and where the row is from."""
    return Record(take(row, "question"), pictures(row), tuple(take(row, name) for name in PAIR))


def read_rlhf_v(row: Row) -> Record:
    """RLHF-V: `image {bytes, path}` and `text`, a JSON text of `{"question", "chosen", "rejected"}`."""
    text = row["text"]
    try:
        inner = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise RowError(f"broken JSON text: 'text' cannot be read: {error}") from error
    if not isinstance(inner, dict):
        raise RowError(
            f"wrong type: 'text' holds a {type_name(inner)}; it must be a JSON object of question, chosen, rejected"
        )
    question, *pair = (_inner(inner, name) for name in ("question", *PAIR))
    return Record(question, pictures(row), tuple(pair))


def _inner(inner: Row, name: str) -> Field:
    field = take(inner, name)
    if isinstance(field.value, RowError):
        return Field(f"text.{name}", RowError(str(field.value).replace("the row", "the JSON object in 'text'", 1)))
    return Field(f"text.{name}", field.value)


def read_align_anything(row: Row) -> Record:
    """align-anything: `question, image, response_1, response_2, overall_response` (1 or 2: the better one)."""
    return Record(take(row, "question"), pictures(row), (take(row, "response_1"), take(row, "response_2")))


def read_mm_rlhf(row: Row) -> Record:
    """MM-RLHF: `prompt, chosen, rejected, image | video`, optional `is_tie`. A row about a video cannot be used."""
    check_read(row)
    return read_pair(row)


# ---- who wins


def judge_pair(row: Row, record: Record) -> Judged:
    """The first response beats every other, by an optional `margin`, or is as good with `tie` or `is_tie`."""
    return _compared(row, record.responses, 0)


def judge_nothing(row: Row, record: Record) -> Judged:
    """All responses, none of them compared."""
    return Judged(tuple(check_response(field) for field in record.responses), ())


def judge_by(name: str, row: Row, record: Record) -> Judged:
    """Two responses, the better one of which the field `name` tells: 1 or 2."""
    better = take(row, name).value
    if isinstance(better, RowError):
        raise better
    if isinstance(better, bool) or number(better) not in (1, 2):
        raise RowError(f"wrong value: '{name}' is {better!r:.50}; it must be 1 or 2: which of the two is better")
    return _compared(row, record.responses, int(float(better)) - 1)


def _compared(row: Row, fields: Sequence[Field], winner: int) -> Judged:
    """One response beats every other; `margin`, `tie` and `is_tie` are the row's, where it has them."""
    responses = [check_response(field) for field in fields]
    best, margin, tie = fields[winner].name, row.get("margin"), _is_tie(row)
    target = 0.0 if margin is None else None if isinstance(margin, bool | str) else number(margin)
    if target is None:
        raise RowError(f"wrong type: 'margin' is {margin!r:.50}; it must be a finite number, or be left out")
    if target < 0 and not tie:  # the margin of a tie is not read
        raise RowError(
            f"negative margin: 'margin' is {margin!r:.50}, but '{best}' is the better one; it must be 0 or more, or be "
            "left out: are the responses the right way round?"
        )
    losers = [i for i in range(len(responses)) if i != winner]
    for i in losers:
        if responses[i] == responses[winner]:
            raise RowError(
                f"identical responses: '{best}' and '{fields[i].name}' are the same text; a comparison needs two"
            )
    return Judged(tuple(responses), tuple(Comparison(winner, i, target, tie) for i in losers))


def _is_tie(row: Row) -> bool:
    values: list[tuple[str, Any]] = [(name, row[name]) for name in ("tie", "is_tie") if row.get(name) is not None]
    for name, value in values:
        if not isinstance(value, bool):
            raise RowError(f"wrong type: '{name}' is {value!r:.50}; it must be true or false, or be left out")
    return any(value for _, value in values)
