"""One row of a preference file to a validated group.

Each file format is a pure function from a row (a JSON object) to a group, listed in `_FORMATS` and recognised by its
fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrm_jax.types import Comparison, Group

Row = Mapping[str, Any]


class RowError(ValueError):
    """One row that cannot be used. The message is "kind of problem: what is wrong and what to do about it"."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row comes from: its file and 1-based row, the folder of its images, and its environment."""

    file: Path
    row: int
    image_root: Path
    environment: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The group of a row, and a reason for each of the row's comparisons and responses that was left out of it."""

    group: Group
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format: the fields that identify it beside `prompt` and the image, and the functions that read a row.

    `parse` makes its group of comparisons; `responses` lists everything to score as (field, value).
    """

    name: str
    fields: tuple[str, ...]
    parse: Callable[[Row, Origin], Parsed]
    responses: Callable[[Row], list[tuple[str, Any]]]


def parse_row(row: Any, origin: Origin) -> Parsed:
    """The group of a row with its comparisons. Raises RowError for a row that cannot be used."""
    return _format_of(row).parse(row, origin)


def list_responses(row: Any) -> list[tuple[str, Any]]:
    """(field, value) of every response of a row, unchecked. Raises RowError where they cannot be told."""
    return _format_of(row).responses(row)


def _format_of(row: Any) -> Format:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(
            f"not an object: the row is a JSON {_type_name(row)}; it must be one object with named fields, "
            'such as {"prompt": ...}'
        )
    for form in _FORMATS:
        if all(field in row for field in form.fields):
            return form
    raise RowError(_unknown_format(row))


def _unknown_format(row: Row) -> str:
    """Say which fields were found, which known format is nearest and what it lacks."""
    nearest = max(
        _FORMATS, key=lambda form: sum(_guess(field, row) is not None for field in form.fields) / len(form.fields)
    )
    missing = " and ".join(_named(field, row) for field in nearest.fields if field not in row)
    return (
        f"unknown format: fields found: {_found(row)}; the nearest format is {nearest.name}, which also needs {missing}"
    )


def _named(field: str, row: Row) -> str:
    """A missing field: "'chosen' (did you mean it by 'choosen'?)"."""
    guess = _guess(field, row)
    return f"'{field}'" + (f" (did you mean it by '{guess}'?)" if guess and guess != field else "")


def _found(row: Row) -> str:
    return ", ".join(sorted(row)) or "none"


def _guess(field: str, row: Row) -> str | None:
    """The row's field that is, or is spelt most like, `field`."""
    return next(iter(difflib.get_close_matches(field, list(row), n=1)), None)


def _pairwise(row: Row, origin: Origin) -> Parsed:
    """The authors' pairs: `id, prompt, img_path, chosen, rejected`; optional `margin` (number) and `tie` (boolean)."""
    chosen, rejected = check_response(row["chosen"], "chosen"), check_response(row["rejected"], "rejected")
    margin, tie = row.get("margin", 0.0), row.get("tie", False)
    target = None if isinstance(margin, bool | str) else _number(margin)
    if target is None:
        raise RowError(f"wrong type: 'margin' is {margin!r:.50}; it must be a finite number, or be left out")
    if not isinstance(tie, bool):
        raise RowError(f"wrong type: 'tie' is {tie!r:.50}; it must be true or false, or be left out")
    if target < 0 and not tie:  # the margin of a tie is not read
        raise RowError(
            f"negative margin: 'margin' is {margin!r:.50}, but 'chosen' is the better one; it must be 0 or more, or be "
            "left out: are 'chosen' and 'rejected' the right way round?"
        )
    if chosen == rejected:
        raise RowError("identical responses: 'chosen' and 'rejected' are the same text; a comparison needs two")
    return Parsed(make_group(row, origin, (chosen, rejected), (Comparison(0, 1, target, tie),)))


def _scoring(row: Row, origin: Origin) -> Parsed:
    """Scoring input: `prompt, img_path, responses`; a group without comparisons."""
    return Parsed(make_group(row, origin, tuple(check_response(value, field) for field, value in _listed(row)), ()))


def _listed(row: Row) -> list[tuple[str, Any]]:
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise RowError(f"wrong type: 'responses' is a {_type_name(responses)}; it must be a list of one or more texts")
    return [(f"responses[{i}]", response) for i, response in enumerate(responses)]


def _vlfeedback(row: Row, origin: Origin) -> Parsed:
    """VLFeedback: `id, prompt, img_path | image, completions`; only responses that are compared are kept."""
    completions = _completions(row["completions"])
    responses = [response for response, _ in completions]
    ratings = [mean_rating(annotations) for _, annotations in completions]
    kept, dropped = [], [_UNRATED.format(i) for i, rating in enumerate(ratings) if rating is None]
    for winner, loser in rated_pairs(ratings):
        problem = _pair_problem(responses, winner, loser)
        if problem:
            dropped.append(problem)
        else:
            kept.append((winner, loser))
    if not kept:
        raise RowError(_no_comparisons(ratings, dropped[ratings.count(None) :]))
    used = sorted(set(itertools.chain.from_iterable(kept)))
    comparisons = tuple(Comparison(used.index(winner), used.index(loser)) for winner, loser in kept)
    return Parsed(make_group(row, origin, tuple(responses[i] for i in used), comparisons), tuple(dropped))


def _completed(row: Row) -> list[tuple[str, Any]]:
    return [
        (f"completions[{i}].response", response) for i, (response, _) in enumerate(_completions(row["completions"]))
    ]


_PAIR = ("chosen", "rejected")
_UNRATED = "unrated response: 'completions[{}]' lacks a numeric 'Rating' for some aspect; it is compared with none"

# The order matters only for a row that has the fields of several formats.
_FORMATS = (
    Format("VLFeedback", ("completions",), _vlfeedback, _completed),
    Format("pairwise preferences", _PAIR, _pairwise, lambda row: [(f, row[f]) for f in _PAIR]),
    Format("scoring input", ("responses",), _scoring, _listed),
)


# ---- VLFeedback


def mean_rating(annotations: Any) -> float | None:
    """The mean of a completion's aspect ratings `{aspect: {"Rating": ...}}`; None where it cannot be compared.

    A rating counts as what `float()` makes of it ("4", " 4 ", "1e0", 4). One that is no finite number, or missing,
    makes the whole completion incomparable, as in the authors' code, which raises at a missing one.
    """
    if not isinstance(annotations, dict) or not annotations:
        return None
    values = [_rating(aspect) for aspect in annotations.values()]
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if len(numbers) == len(values) else None


def _rating(aspect: Any) -> float | None:
    return _number(aspect.get("Rating")) if isinstance(aspect, dict) else None


def rated_pairs(ratings: Sequence[float | None]) -> list[tuple[int, int]]:
    """(winner, loser) of all pairs with differing ratings, ordered {0, 1}, {0, 2}, ..., {1, 2}, ...; ties give none."""
    pairs = []
    for i, j in itertools.combinations(range(len(ratings)), 2):
        first, second = ratings[i], ratings[j]
        if first is not None and second is not None and first != second:
            pairs.append((i, j) if first > second else (j, i))
    return pairs


def _completions(value: Any) -> list[tuple[Any, Any]]:
    """(response, annotations) of each completion, from a list of objects or an object of lists."""
    if isinstance(value, dict):
        responses, annotations = value.get("response"), value.get("annotations")
        if isinstance(responses, list) and isinstance(annotations, list) and len(responses) == len(annotations):
            return list(zip(responses, annotations, strict=True))
        raise RowError(
            "wrong type: 'completions' is an object: its 'response' and 'annotations' must be lists of one length"
        )
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(
            "wrong type: 'completions' must be a list of objects with 'response' and 'annotations', "
            f"or an object of lists; it is a {_type_name(value)}"
            + (" with other items" if isinstance(value, list) else "")
        )
    return [(item.get("response"), item.get("annotations")) for item in value]


def _pair_problem(responses: Sequence[Any], winner: int, loser: int) -> str | None:
    """Why two completions cannot be compared, if so."""
    try:
        first, second = (check_response(responses[i], f"completions[{i}].response") for i in (winner, loser))
    except RowError as error:
        return str(error)
    if first == second:
        return f"identical responses: completions {winner} and {loser} are the same text with different ratings"
    return None


def _no_comparisons(ratings: Sequence[float | None], dropped: Sequence[str]) -> str:
    unrated = sum(rating is None for rating in ratings)
    parts = [f"of {len(ratings)} completions {unrated} lack a numeric 'Rating' for some aspect"]
    if len(ratings) - unrated > 1:
        parts.append(f"{len(ratings) - unrated} are rated" + (", all alike" if not dropped else ""))
    return f"no comparisons left: {'; '.join([*parts, *dropped])}"


# ---- fields


def make_group(row: Row, origin: Origin, responses: tuple[str, ...], comparisons: tuple[Comparison, ...]) -> Group:
    """The group of a row's own prompt and image. Raises RowError where one of them cannot be used.

    A prompt may be blank beside an image, which is then all that is asked about, and not without one.
    """
    prompt, image = _prompt(row), _image(row, origin)
    if image is None and not prompt.strip():
        raise RowError("empty prompt: 'prompt' has no text, and there is no image either; remove the row or fill it in")
    return Group(
        id=identity(row, origin),
        prompt=prompt,
        responses=responses,
        comparisons=comparisons,
        image=image,
        environment=origin.environment,
        file=str(origin.file),
        row=origin.row,
        image_name=row[field] if (field := image_field(row)) else None,
    )


def identity(row: Row, origin: Origin) -> str:
    """The row's `id`; a row without a usable one is named after its file and row."""
    value = row.get("id")
    if isinstance(value, int) or (isinstance(value, str) and _encodable(value)):
        return str(value)
    return f"{origin.file.stem}-{origin.row}"


def _prompt(row: Row) -> str:
    if "prompt" not in row:
        raise RowError(f"missing field: the row has no {_named('prompt', row)}; fields found: {_found(row)}")
    return _text(row["prompt"], "prompt")


def _image(row: Row, origin: Origin) -> Path | None:
    """The path in `img_path` or `image`, checked to exist; None where the field is null."""
    field = image_field(row)
    if field is None:
        raise RowError(
            f"missing field: the row has no {_named('img_path', row)}; fields found: {_found(row)}; "
            'a text-only record says "img_path": null'
        )
    value = row[field]
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"wrong type: '{field}' is {value!r:.50}; it must be the path of an image file, or null")
    path = origin.image_root / value
    # os.path and not Path.is_file, which raises for names that are too long.
    if not os.path.isfile(path):
        problem = (
            "is a directory; name the file in it" if os.path.isdir(path) else "does not exist; is the image root right?"
        )
        raise RowError(f"missing image file: '{field}' points to {path}, which {problem}")
    return path


def image_field(row: Row) -> str | None:
    """The field that a row names its image in, if it has one."""
    return next((name for name in ("img_path", "image") if name in row), None)


def check_response(value: Any, field: str) -> str:
    """The response in a field. Raises RowError where it is no text, or an empty one."""
    text = _text(value, field)
    if not text.strip():
        raise RowError(f"empty response: '{field}' has no text; remove the row or fill it in")
    return text


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"wrong type: '{field}' is a {_type_name(value)}; it must be a text")
    if not _encodable(value):
        raise RowError(f"broken text: '{field}' has half of a surrogate pair, which is no character; fix its encoding")
    return value


def _number(value: Any) -> float | None:
    """The finite number that `float()` makes of a JSON text or number, if any."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return names[type(value)]
