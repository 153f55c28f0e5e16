"""`mmrm best-of-n`: the favourites among scored responses, and what best-of-n costs and is worth."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmrm_jax.data.records import DataError, read_rows
from mmrm_jax.eval.best_of import Curve, best_of_curve, doubling
from mmrm_jax.eval.report_plots import new_figure, to_png

PROMPT = ("id", "img_path", "history", "prompt")  # what lines of one prompt have in common
SCORE, GOLD = "score", "gold"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The scored responses to one prompt: lines of `mmrm score`, their scores, and their gold scores where known."""

    lines: list[dict[str, Any]]
    scores: np.ndarray
    gold: np.ndarray | None


def best_of_n(
    scores: Path,
    out: Path,
    *,
    top: int,
    gold: str | None,
    gold_scores: Path | None,
    plot: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Write the `top` best-scored responses to each prompt, best first, and print the curve of best-of-n.

    `scores` is what `mmrm score` wrote; lines that follow one another with the same id, image and prompt are responses
    to one prompt, and lines without a score are left out and counted. Gold scores are the field `gold` of its lines, or
    the scores of `gold_scores`, a file with the same lines. n runs up to the number of responses that every prompt has.
    Raises ValueError where an option does not fit or a file that is read would be overwritten, DataError naming file,
    row and field that cannot be used.
    """
    if top < 1:
        raise ValueError(f"--top is {top}; it must be at least 1")
    if gold is not None and gold_scores is not None:
        raise ValueError("--gold names a field of the lines, --gold-scores a file in its place: give one of them")
    _check_outputs({"--out": out, "--plot": plot}, [scores, gold_scores])
    lines, unscored = _scored(scores)
    judged = _gold(scores, lines, gold, gold_scores)
    choices = list(_by_prompt(lines, judged))
    with out.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for choice in choices:
            file.writelines(json.dumps(pick, ensure_ascii=False) + "\n" for pick in _picks(choice, top))
    most = min(len(choice.lines) for choice in choices)
    values = {SCORE: [choice.scores for choice in choices]}
    if judged is not None:
        values[GOLD] = [choice.gold for choice in choices if choice.gold is not None]
    curve = best_of_curve(values[SCORE], values, doubling(most))
    console.print(_table(curve))
    if unscored:
        console.print(f"left out: {unscored} lines of {scores} without a score", style="yellow")
    if (largest := max(len(choice.lines) for choice in choices)) > most:
        console.print(f"n ends at {most}, which every prompt has; some have {largest}: picks are among all of them")
    if plot is not None:
        plot.write_bytes(_plot(curve))
    best = "response" if top == 1 else top
    console.print(f"the best {best} of {len(choices)} prompts: {out}", soft_wrap=True)
    found = {"out": str(out), "prompts": len(choices), "responses": len(lines), "unscored": unscored}
    return found | {"ns": curve.ns, "kl": curve.kl, "curves": curve.values}


def _check_outputs(outputs: dict[str, Path | None], inputs: Sequence[Path | None]) -> None:
    """Raises ValueError where an output, by its option, is an input or another output."""
    taken = [file for file in inputs if file is not None]
    for option, file in outputs.items():
        if file is None:
            continue
        for other in taken:
            if _same(file, other):
                raise ValueError(f"{option} {file} would overwrite {other}, of this very command; give it another name")
        taken.append(file)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def _scored(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """(row, line) of every line with a score, and how many have none."""
    lines, unscored = [], 0
    for row, line in read_rows(path):
        if not isinstance(line, dict):
            raise DataError(f"{path} row {row}: it is no JSON object, as lines of mmrm score are")
        if line.get(SCORE) is None and line.get("error") is not None:  # a column of Parquet is there, and null
            unscored += 1
            continue
        _number(path, row, line, SCORE)
        lines.append((row, line))
    if not lines:
        raise DataError(f"{path} has no line with a score; mmrm score writes them")
    return lines, unscored


def _number(path: Path, row: int, line: dict[str, Any], field: str) -> float:
    if field not in line:
        raise DataError(f"{path} row {row}: there is no '{field}', only {', '.join(line) or 'an empty object'}")
    value = line[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{path} row {row}: '{field}' is {value!r:.50}; it must be a finite number")
    return float(value)


def _gold(
    path: Path, lines: list[tuple[int, dict[str, Any]]], field: str | None, other: Path | None
) -> list[float] | None:
    """The gold score of each line; None where there is none."""
    if field is not None:
        return [_number(path, row, line, field) for row, line in lines]
    if other is None:
        return None
    known = dict(read_rows(other))
    found = []
    for row, line in lines:
        same = known.get(row)
        if not isinstance(same, dict) or any(same.get(name) != line.get(name) for name in (*PROMPT, "response")):
            raise DataError(f"{other} row {row} is not about the response of {path} row {row}: score the same file")
        found.append(_number(other, row, same, SCORE))
    return found


def _by_prompt(lines: list[tuple[int, dict[str, Any]]], gold: list[float] | None) -> Iterator[Choice]:
    numbered = enumerate(line for _, line in lines)
    for _, same in itertools.groupby(numbered, key=lambda each: [each[1].get(name) for name in PROMPT]):
        places, chosen = zip(*same, strict=True)
        judged = None if gold is None else np.asarray([gold[i] for i in places])
        yield Choice(list(chosen), np.asarray([line[SCORE] for line in chosen], np.float64), judged)


def _picks(choice: Choice, top: int) -> Iterator[dict[str, Any]]:
    """The best lines with their rank; of equal scores the first comes first."""
    for rank, i in enumerate(np.argsort(-choice.scores, kind="stable")[:top].tolist(), 1):
        judged = {} if choice.gold is None else {GOLD: float(choice.gold[i])}
        yield choice.lines[i] | judged | {"rank": rank, "of": len(choice.lines)}


def _table(curve: Curve) -> Table:
    table = Table(title="best of n: means over prompts, with 95 % intervals", title_justify="left")
    table.add_column("n", justify="right")
    table.add_column("KL, nats", justify="right")
    for name in curve.values:
        table.add_column(name, justify="right")
    for i, (n, kl) in enumerate(zip(curve.ns, curve.kl, strict=True)):
        points = (values[i] for values in curve.values.values())
        table.add_row(f"{n}", f"{kl:.2f}", *map(_shown, points))
    return table


def _shown(point: dict[str, float | None]) -> str:
    """A mean with its interval, which a single prompt does not give."""
    around = "" if point["low"] is None else f" ({point['low']:.3f} to {point['high']:.3f})"
    return f"{point['mean']:.3f}{around}"


def _plot(curve: Curve) -> bytes:
    """Each curve against the divergence from the policy, beside one another."""
    figure = new_figure(4.2 * len(curve.values), 3.2)
    axes = figure.subplots(1, len(curve.values), squeeze=False)[0]
    for place, (name, points) in zip(axes, curve.values.items(), strict=True):
        mean, low, high = (np.asarray([point[key] for point in points], float) for key in ("mean", "low", "high"))
        place.plot(curve.kl, mean, marker="o", markersize=3)
        place.fill_between(curve.kl, low, high, alpha=0.2)
        place.set_title(f"{name} of the best of n")
        place.set_xlabel("KL from the policy, nats")
        for n, x, y in zip(curve.ns, curve.kl, mean, strict=True):
            place.annotate(f"{n}", (x, y), textcoords="offset points", xytext=(0, 5), ha="center", fontsize=7)
    return to_png(figure)
