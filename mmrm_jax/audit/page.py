"""The audit's report: one HTML file that needs no network and no JavaScript."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrm_jax import __version__
from mmrm_jax.audit.examples import Example
from mmrm_jax.audit.plots import rates, word_weights
from mmrm_jax.audit.study import WORDS, words_tell
from mmrm_jax.audit.tables import (
    Grid,
    overlap_grid,
    overview,
    repeats_grid,
    style_grid,
    transfer_grid,
    words_grid,
)
from mmrm_jax.audit.verdict import furthest, level
from mmrm_jax.data.records import quarantine_kind
from mmrm_jax.eval.report_page import PAGE, STYLE
from mmrm_jax.eval.report_parts import escaped, html_section, html_table, images_html, png_figure
from mmrm_jax.eval.report_plots import heat_map
from mmrm_jax.eval.summary import percent
from mmrm_jax.types import Quarantined

_TITLE = "How far text alone goes"


@dataclasses.dataclass(frozen=True)
class AuditPage:
    """What the page shows: the command, the audit's result, comparisons, and rows that could not be used."""

    command: str
    result: Mapping[str, Any]
    examples: Sequence[Example]
    quarantined: Sequence[Quarantined]


def write_page(path: Path, data: AuditPage) -> None:
    """Write the report to `path` (UTF-8 HTML). Raises OSError where it cannot be written."""
    sections = (_verdicts, _baselines, _transfer, _styles, _words, _examples, _repeats, _how)
    body = "\n".join(part(data) for part in sections)
    page = PAGE.format(title=_TITLE, style=STYLE, headline=_headline(data.result), body=body)
    # A lone surrogate in a record has no UTF-8 form; it must not cost the report.
    path.write_text(page, encoding="utf-8", errors="replace")


def _headline(result: Mapping[str, Any]) -> str:
    """The first sentence of the environment where text goes furthest."""
    found = furthest(result["environments"])
    name = f"{found['name']}: " if len(result["environments"]) > 1 else ""
    return f"<p class='headline'>{escaped(name + found['verdict']['sentences'][0])}</p>"


def _verdicts(data: AuditPage) -> str:
    parts = []
    for each in data.result["environments"]:
        found = each["verdict"]
        said = "".join(f"<p>{escaped(sentence)}</p>" for sentence in found["sentences"])
        parts.append(f"<h3>{escaped(each['name'])}: {escaped(found['level'])}</h3>{said}")
    if data.result["across"]:
        items = "".join(f"<li>{escaped(sentence)}</li>" for sentence in data.result["across"])
        parts.append(f"<h3>Between them</h3><ul>{items}</ul>")
    if command := furthest(data.result["environments"])["verdict"]["command"]:
        parts.append(f"<p class='muted'>A text-only model says more:</p><pre>{escaped(command)}</pre>")
    return html_section("Verdict", data.result["definition"], "".join(parts))


def _grid(grid: Grid) -> str:
    """A table of values with small notes."""
    rows = []
    for row in grid.rows:
        cells = [
            f"<span class='value'>{escaped(value)}</span>" if i else escaped(value) for i, (value, _) in enumerate(row)
        ]
        notes = [f"<small>{escaped(note)}</small>" if note else "" for _, note in row]
        rows.append([cell + note for cell, note in zip(cells, notes, strict=True)])
    return html_table(grid.header, rows) if rows else "<p class='empty'>Nothing measured.</p>"


def _grid_section(grid: Grid, more: str = "") -> str:
    return html_section(grid.title, grid.lead, _grid(grid) + more)


def _figures(figures: Sequence[str]) -> str:
    return f"<div class='grid wide'>{''.join(figures)}</div>" if figures else ""


def _baselines(data: AuditPage) -> str:
    figures = []
    for each in data.result["environments"]:
        rows = [(row["name"], row["accuracy"], row["low"], row["high"]) for row in each["baselines"]]
        if rows:
            figures.append(_dots(each["name"], rows, "right in held-out comparisons, %"))
    return _grid_section(overview(data.result["environments"]), _figures(figures))


def _dots(name: str, rows: Sequence[tuple[str, float | None, float | None, float | None]], label: str) -> str:
    alt = f"{label}, {name}: " + "; ".join(f"{row[0]} {percent(row[1])}" for row in rows)
    return png_figure(rates(rows, label), name, alt)


def _transfer(data: AuditPage) -> str:
    environments = data.result["environments"]
    matrix = data.result["matrix"]
    if len(environments) < 2 or not matrix:
        return ""
    trains = list(dict.fromkeys(row["train"] for row in matrix))
    tests = list(dict.fromkeys(row["test"] for row in matrix))
    png = heat_map(matrix, "accuracy", trains=trains, tests=tests, iid={name: name for name in trains})
    cells = "; ".join(f"{row['train']} on {row['test']} {percent(row['accuracy'])}" for row in matrix)
    figure = png_figure(png, WORDS, f"Accuracy of the bag of words in percent: {cells}")
    grid = transfer_grid(data.result)
    shared = overlap_grid(data.result)
    more = f"<h3>{escaped(shared.title)}</h3><p class='lead'>{escaped(shared.lead)}</p>{_grid(shared)}"
    return html_section(grid.title, grid.lead, _figures([figure]) + _grid(grid) + more)


def _styles(data: AuditPage) -> str:
    figures = []
    for each in data.result["environments"]:
        rows = [(f"more {r['style']}", r["agreement"], r["low"], r["high"]) for r in each["styles"] if r["n"]]
        if rows:
            figures.append(_dots(each["name"], rows, "the response with more of it wins, %"))
    return _grid_section(style_grid(data.result["environments"]), _figures(figures))


def _words(data: AuditPage) -> str:
    parts = []
    for each in data.result["environments"]:
        if each["words"] and words_tell(each):
            alt = "; ".join(f"{word['word']} {word['weight']:+.2f}" for word in each["words"])
            figure = png_figure(word_weights(each["words"]), "", f"Weights of words: {alt}")
            parts.append(f"<h3>{escaped(each['name'])}</h3>{_figures([figure, _grid(words_grid(each))])}")
        else:
            parts.append(f"<h3>{escaped(each['name'])}</h3><p class='empty'>{_no_words(each)}</p>")
    lead = (
        "Weights of words and word pairs in the bag of words fitted to all comparisons, and how often a rule of that "
        "word alone is right in the n comparisons in which one response has it and the other has not."
    )
    return html_section("The most telling words", lead, "".join(parts))


def _no_words(result: Mapping[str, Any]) -> str:
    return "Too few comparisons to say." if level(result) == "too few" else "Words do not tell the two apart."


def _examples(data: AuditPage) -> str:
    titles = {"right": "right and surest", "wrong": "wrong and surest"}
    parts = []
    for name in dict.fromkeys(example.environment for example in data.examples):
        for kind, title in titles.items():
            cards = [_card(e) for e in data.examples if e.environment == name and e.kind == kind]
            if cards:
                parts.append(f"<h3>{escaped(name)}: {title}</h3><div class='grid'>{''.join(cards)}</div>")
    lead = (
        "Comparisons on which the surest baseline is surest, as it judges them when they are held out: those it gets "
        "right need no image, those it gets wrong are where a model that leans on text fails."
    )
    return html_section(
        "Look at them", lead, "".join(parts) or "<p class='empty'>No baseline is surely better than guessing.</p>"
    )


def _card(example: Example) -> str:
    margin = f"{example.margin:+.2f}".replace("-", "−")
    side = "lowest" if example.kind == "right" else "highest"  # the page's blue and orange
    return (
        f"<article class='card {side}'>{images_html(example.images, example.prompt)}"
        f"<p class='prompt'>{escaped(example.prompt)}</p>"
        f"<p class='answer good'><b>chosen</b>{escaped(example.chosen)}</p>"
        f"<p class='answer bad'><b>rejected</b>{escaped(example.rejected)}</p>"
        f"<p class='margins'><span>margin, {escaped(example.baseline)} <b>{margin}</b></span></p>"
        f"<p class='meaning'>{escaped(example.id)}, row {example.row}</p></article>"
    )


def _repeats(data: AuditPage) -> str:
    parts = []
    for each in data.result["environments"]:
        pairs = each["near_duplicates"]["examples"]
        if pairs:
            rows = [
                (f"{pair['similarity']:.2f}", escaped(pair["first"][:160]), escaped(pair["second"][:160]))
                for pair in pairs
            ]
            parts.append(f"<h3>{escaped(each['name'])}: responses that are nearly the same</h3>")
            parts.append(f"<div class='wrap'>{html_table(('similarity', 'one', 'other'), rows)}</div>")
    return _grid_section(repeats_grid(data.result["environments"]), "".join(parts))


def _how(data: AuditPage) -> str:
    parts = [f"<pre>{escaped(data.command)}</pre>"] if data.command else []
    facts = [
        (each["name"], f"{each['data']}: {each['groups']} groups, {each['groups_with_image']} with an image")
        for each in data.result["environments"]
    ]
    facts += [("versions", f"mmrm_jax {__version__}"), ("seconds", f"{data.result['seconds']:.0f}")]
    parts.append(html_table(("", ""), ((escaped(name), escaped(fact)) for name, fact in facts)))
    if data.quarantined:
        counts = collections.Counter((row.file, quarantine_kind(row)) for row in data.quarantined)
        rows = [(escaped(file), escaped(kind), str(n)) for (file, kind), n in counts.most_common(30)]
        parts.append(f"<h3>Rows that could not be used: {len(data.quarantined)}</h3>")
        parts.append(html_table(("file", "reason", "rows"), rows))
    lead = (
        "Bag of words: TF-IDF of words and word pairs, chosen minus rejected, logistic regression without an intercept "
        "(L2, C = 1), five folds. Length and style: the same on the styles' signs and logarithms. Prompts are not "
        "looked at, nor is what goes beyond pairs of words."
    )
    return html_section("How it was computed", lead, "".join(parts))
