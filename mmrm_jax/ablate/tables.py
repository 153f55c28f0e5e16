"""The table of an ablation: a row an objective and point, in a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmrm_jax.eval.summary import BASELINE, between, percent, points

LEVELS = ("iid", "ood", "other", "sfd")
CHANGES = ("iid", "ood", "other", "sfd")
HEADINGS = {"iid": "i.i.d.", "ood": "o.o.d.", "other": "other", "sfd": "SFD"}
Row = dict[str, Any]


def table_rows(summary: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One flat row for each point and objective.

    Levels "iid", "ood", "other", "sfd" and differences from standard "iid_change", ... are fractions, each with "_low"
    and "_high"; "_p" of a difference is Holm's. Then "forwards", "seconds" and "cost", seconds over those of standard.
    None is what is undefined, or not compared.
    """
    levels = {(r["setting"], r["objective"], r["measure"]): r for r in summary if r["versus"] is None}
    changes = {(r["setting"], r["objective"], r["measure"]): r for r in summary if r["versus"] is not None}
    spent = {(c["setting"], c["objective"]): c for c in costs}
    rows = []
    for setting, objective in dict.fromkeys((key[0], key[1]) for key in levels):
        row: Row = {"setting": setting, "objective": objective}
        for measure in LEVELS:
            row |= _columns(measure, levels.get((setting, objective, measure)))
        for measure in CHANGES:
            change = changes.get((setting, objective, measure))
            row |= _columns(f"{measure}_change", change)
            row[f"{measure}_p"] = None if change is None else change["p_holm"]
        cost = spent.get((setting, objective), {})
        row |= {"forwards": cost.get("forwards"), "seconds": cost.get("seconds"), "cost": cost.get("versus")}
        row["seeds"] = max(r["seeds"] for key, r in levels.items() if key[:2] == (setting, objective))
        rows.append(row)
    return rows


def _columns(name: str, row: Mapping[str, Any] | None) -> Row:
    found = {"mean": None, "low": None, "high": None} if row is None else row
    return {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def headings(rows: Sequence[Row]) -> list[str]:
    """Of the columns that `cells` gives."""
    first = ["setting"] if any(row["setting"] for row in rows) else []
    levels = [HEADINGS[m] for m in LEVELS if any(row[m] is not None for row in rows)]
    return [
        *first,
        "objective",
        *levels,
        *(f"{HEADINGS[m]} − {BASELINE}" for m in shown_changes(rows)),
        "forwards",
        "time",
    ]


def shown_changes(rows: Sequence[Row]) -> list[str]:
    """The differences that have a column: those that any row has."""
    return [m for m in CHANGES if any(row[f"{m}_change"] is not None for row in rows)]


def label(row: Row) -> str:
    """The objective, with † where its models are worse than chance in distribution.

    They prefer what text says is wrong, and owe to that, not to the image, what they gain where a cue is turned round.
    """
    return row["objective"] + (" †" if row["iid"] is not None and row["iid"] < 0.5 else "")


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A row as text: levels in %, differences in points with 95 % intervals, and * where Holm's p is below .05."""
    found = [row["setting"]] if any(r["setting"] for r in rows) else []
    found.append(label(row))
    found += [percent(row[m]) for m in LEVELS if any(r[m] is not None for r in rows)]
    for measure in shown_changes(rows):
        bounds = between(row[f"{measure}_change_low"], row[f"{measure}_change_high"], points)
        found.append(change(row, measure) + (f" ({bounds})" if bounds else ""))
    forwards = row["forwards"]
    return [*found, "–" if forwards is None else f"{forwards:g}", time(row)]


def change(row: Row, measure: str) -> str:
    """A difference in points, with * where Holm's p is below .05."""
    p = row[f"{measure}_p"]
    return points(row[f"{measure}_change"]) + ("*" if p is not None and p < 0.05 else "")


def time(row: Row) -> str:
    """That of a run over standard training's."""
    return "–" if row["cost"] is None else f"{row['cost']:.2f}×"


def legend(rows: Sequence[Row], *, intervals: bool = True) -> str:
    """What a reader of the table has to know; in a terminal it has no intervals."""
    intervals = intervals and any(row[f"{m}_change_low"] is not None for row in rows for m in CHANGES)
    text = (
        f"In %; differences from standard training in points{', with 95 % intervals' if intervals else ''}; "
        "* where Holm's p < .05 (text_only, the shortcut itself, is not tested); † worse than chance i.i.d"
    )
    if any(row["other"] is not None for row in rows):
        text += "; other: tests of no training environment"
    if max((row["seeds"] for row in rows), default=0) == 1:
        of = "intervals and stars" if intervals else "stars"
        text += f". One seed: {of} are of these trained models, not of others"
    return text + "."


def terminal_table(rows: Sequence[Row], setting: str) -> Table:
    """The rows of one setting for a terminal, without intervals."""
    table = Table(title=Text(setting) if setting else None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("objective", overflow="fold", min_width=22)
    measures = shown_changes(rows)
    shown = [m for m in LEVELS if any(row[m] is not None for row in rows)]
    for heading in (*(HEADINGS[m] for m in shown), *(f"Δ {HEADINGS[m]}" for m in measures), "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (row for row in rows if row["setting"] == setting):
        levels = (percent(row[m]) for m in shown)
        table.add_row(Text(label(row)), *levels, *(change(row, m) for m in measures), time(row))
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """A table of GitHub's Markdown, and its legend."""
    lines = [headings(rows), ["---", *["---:"] * (len(headings(rows)) - 1)], *(cells(row, rows) for row in rows)]
    table = "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)
    return f"{table}\n{legend(rows)}\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "^": r"\^{}",
    "~": r"\~{}",
    "†": r"$\dagger$",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "−": "$-$",
    "×": r"$\times$",
    "–": "--",
    "<": "$<$",
}


def as_latex(rows: Sequence[Row], caption: str) -> str:
    """A table environment with the booktabs package's rules."""

    def line(texts: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in text) for text in texts) + r" \\" + "\n"

    columns = "l" + "r" * (len(headings(rows)) - 1)
    body = line(headings(rows)) + "\\midrule\n" + "".join(line(cells(row, rows)) for row in rows)
    caption, note = ("".join(_LATEX.get(c, c) for c in text) for text in (caption, legend(rows)))
    return (
        "\\begin{table}\n\\centering\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n"
        f"\\caption{{{caption}. {note}}}\n\\end{{table}}\n"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """Every number of every row; empty where undefined."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["setting", "objective"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
