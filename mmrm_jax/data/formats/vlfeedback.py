"""VLFeedback: several completions of a prompt, each rated by aspect; every pair with different means is compared."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from mmrm_jax.data.formats.fields import (
    Field,
    Judged,
    Record,
    Row,
    RowError,
    check_response,
    number,
    pictures,
    take,
    type_name,
)
from mmrm_jax.types import Comparison

_UNRATED = "unrated response: 'completions[{}]' lacks a numeric 'Rating' for some aspect; it is compared with none"


def read_vlfeedback(row: Row) -> Record:
    """VLFeedback: `id, prompt, img_path | image, completions`."""
    completions = enumerate(_completions(row["completions"]))
    responses = tuple(Field(f"completions[{i}].response", response) for i, (response, _) in completions)
    return Record(take(row, "prompt"), pictures(row), responses)


def judge_vlfeedback(row: Row, record: Record) -> Judged:
    """Every pair of completions with different mean ratings; only responses that are compared are kept."""
    responses = record.responses
    ratings = [mean_rating(annotations) for _, annotations in _completions(row["completions"])]
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
    return Judged(tuple(responses[i].value for i in used), comparisons, tuple(dropped))


def mean_rating(annotations: Any) -> float | None:
    """The mean of a completion's aspect ratings `{aspect: {"Rating": ...}}`; None where it cannot be compared.

    A rating counts as what `float()` makes of it ("4", " 4 ", "1e0", 4). One that is no finite number, or missing,
    makes the whole completion incomparable, as in the authors' code, which raises at a missing one. An aspect that a
    completion has nothing of is not missed, as there: Parquet, where it is null, has it without a rating.
    """
    if not isinstance(annotations, dict) or not annotations:
        return None
    values = [_rating(aspect) for aspect in annotations.values()]
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if len(numbers) == len(values) else None


def _rating(aspect: Any) -> float | None:
    return number(aspect.get("Rating")) if isinstance(aspect, dict) else None


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
            f"or an object of lists; it is a {type_name(value)}"
            + (" with other items" if isinstance(value, list) else "")
        )
    return [(item.get("response"), item.get("annotations")) for item in value]


def _pair_problem(responses: Sequence[Field], winner: int, loser: int) -> str | None:
    """Why two completions cannot be compared, if so."""
    try:
        first, second = (check_response(responses[i]) for i in (winner, loser))
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
