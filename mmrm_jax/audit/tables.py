"""The audit's tables as plain text cells, for the terminal and for the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmrm_jax.eval.summary import between, percent

Result = Mapping[str, Any]
_NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table: its title, what it says, the header, and rows of (value, interval or note) cells."""

    title: str
    lead: str
    header: tuple[str, ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]


def overview(environments: Sequence[Result]) -> Grid:
    """Every environment with its baselines."""
    names = list(dict.fromkeys(row["name"] for each in environments for row in each["baselines"]))
    found = [{row["name"]: row for row in each["baselines"]} for each in environments]
    shares = [each["shortcut"] for each in environments]
    rows = [
        (("comparisons", ""), *((str(e["comparisons"]), f"{e['units']} independent") for e in environments)),
        *(((name, ""), *(_accuracy(baselines.get(name)) for baselines in found)) for name in names),
        (("shortcut share", ""), *(_rate(s["share"], s["low"], s["high"]) if s else (_NOTHING, "") for s in shares)),
        (("shortcut", ""), *((e["verdict"]["level"], "") for e in environments)),
    ]
    return Grid(
        "Right from text alone, in %",
        "Accuracy on held-out comparisons, with 95 % intervals; guessing is right in 50 %. What shares an image is "
        "held out together. Where responses come back with other images, intervals are over texts, but for the bag of "
        "words, which is also tried on new texts: those of a test comparison are in none of its training comparisons.",
        ("", *(each["name"] for each in environments)),
        tuple(rows),
    )


def _accuracy(row: Result | None) -> tuple[str, str]:
    if row is None:
        return _NOTHING, ""
    value, bounds = _rate(row["accuracy"], row["low"], row["high"])
    wins = row.get("direction", "neither")
    return value, "; ".join(note for note in (bounds, "" if wins == "neither" else wins) if note)


def _rate(value: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    return percent(value), between(low, high, percent)


def transfer_grid(result: Result) -> Grid:
    """The bag of words of every environment on every other."""
    rows = {(row["train"], row["test"]): row for row in result["matrix"]}
    tests = list(dict.fromkeys(test for _, test in rows))
    cells = []
    for train in dict.fromkeys(train for train, _ in rows):
        found = [rows[train, test] for test in tests]
        cells.append(((train, ""), *((_rate(r["accuracy"], r["low"], r["high"])) for r in found)))
    return Grid(
        "Bag of words trained here, tested there, in %",
        "On its own environment, the held-out folds. Elsewhere all comparisons but those that the training environment "
        "has too; a dash: too few are left.",
        ("trained on \\ tested on", *tests),
        tuple(cells),
    )


def style_grid(environments: Sequence[Result]) -> Grid:
    """Every style in every environment."""
    found = [{row["style"]: row for row in each["styles"]} for each in environments]
    cells = []
    for name in dict.fromkeys(name for rows in found for name, row in rows.items() if row["n"]):
        cells.append(((f"more {name}", ""), *(_style(rows.get(name)) for rows in found)))
    return Grid(
        "Styles: how often the response with more of it wins, in %",
        "Of the n comparisons in which the two differ; 95 % intervals, where there are texts enough.",
        ("", *(each["name"] for each in environments)),
        tuple(cells),
    )


def _style(row: Result | None) -> tuple[str, str]:
    if row is None or not row["n"]:
        return _NOTHING, ""
    bounds = between(row["low"], row["high"], percent)
    return percent(row["agreement"]), f"{bounds + '; ' if bounds else ''}n = {row['n']}"


def words_grid(each: Result) -> Grid:
    """The most telling words of an environment, those for a response beside those against."""
    sides = [[w for w in each["words"] if sign * w["weight"] > 0] for sign in (1, -1)]
    rows = []
    for i in range(max(map(len, sides))):
        rows.append(tuple(cell for side in sides for cell in (_word(side[i]) if i < len(side) else (("", ""),) * 3)))
    head = ("weight", "right alone, in %")
    return Grid(
        f"{each['name']}: the most telling words",
        "Weight in the bag of words, and how often a rule of that word alone is right in the n comparisons in which "
        "one response has it and the other has not.",
        ("for a response", *head, "against one", *head),
        tuple(rows),
    )


def _word(word: Result) -> tuple[tuple[str, str], ...]:
    weight = f"{word['weight']:+.2f}".replace("-", "−")
    return (word["word"], ""), (weight, ""), (percent(word["accuracy"]), f"n = {word['n']}")


def repeats_grid(environments: Sequence[Result]) -> Grid:
    """Duplicates, conflicts, cycles, ties and how responses repeat."""
    columns = []
    for each in environments:
        found, near, said = each["repeats"], each["near_duplicates"], each["responses"]
        columns.append(
            (
                (str(each["ties"]), ""),
                (str(found["duplicates"]), ""),
                (str(found["conflicts"]), f"{found['conflicting']} comparisons" if found["conflicts"] else ""),
                (str(found["cycles"]), ""),
                (str(near["alike"]), ""),
                (str(said["distinct"]), ""),
                (str(near["near"]), ""),
                (f"{percent(said['repeated'])} %", ""),
                (_NOTHING if found["ceiling"] is None else f"{percent(found['ceiling'])} %", ""),
            )
        )
    names = (
        "ties",
        "duplicates",
        "conflicts",
        "circles",
        "alike",
        "responses",
        "near duplicates",
        "repeated",
        "ceiling",
    )
    rows = [((name, ""), *cells) for name, cells in zip(names, zip(*columns, strict=True), strict=True)]
    return Grid(
        "Repeats, conflicts, ties",
        "Duplicates say the same of the same image, prompt and pair once more; conflicts say the contrary; circles are "
        "images with a prompt where A beats B, B beats C and C beats A. Alike: comparisons of two nearly equal "
        "responses. Then distinct responses, and those with a near duplicate among them. Repeated: comparisons with a "
        "response that those of unrelated images and prompts have too. Ceiling: no model of prompt and responses alone "
        "is right more often.",
        ("", *(each["name"] for each in environments)),
        tuple(rows),
    )


def overlap_grid(result: Result) -> Grid:
    """What environments share."""
    fields = ("images", "pairs", "responses", "near_responses")
    rows = [
        ((f"{row['of']} in {row['within']}", ""), *((f"{percent(row[f])} %", "") for f in fields))
        for row in result["overlap"]
    ]
    return Grid(
        "What the environments share",
        "How much of one is in the other too: comparisons by their image and by their prompt and pair of responses, "
        "distinct responses to the letter or nearly.",
        ("", "images", "pairs of responses", "responses", "or nearly"),
        tuple(rows),
    )
