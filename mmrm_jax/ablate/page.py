"""The report of an ablation: gains with their intervals, gain against cost, and the whole table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrm_jax.ablate.tables import Row, cells, headings, legend
from mmrm_jax.eval.report_page import PAGE, STYLE
from mmrm_jax.eval.report_parts import escaped, html_section, html_table, png_figure
from mmrm_jax.eval.report_plots import axis_label, new_figure, to_png
from mmrm_jax.eval.summary import BASELINE, points

_BETTER, _WORSE, _UNSURE = "#1d6f42", "#b42318", "#66717e"
# What a gain is measured by: the first of these that any row defines. With one training environment there is no o.o.d.
_GAINS = {"ood": "out of distribution", "other": "on other tests", "iid": "in distribution"}


def write_page(
    path: Path,
    title: str,
    command: str,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    reports: Mapping[str, str],
) -> None:
    """Write the page (UTF-8 HTML); `reports` are the points' own, by name, relative to it."""
    measure = next((m for m in _GAINS if any(row[f"{m}_change"] is not None for row in rows)), "ood")
    sections = [_gains(rows), _costs(rows, measure), _table(rows), _how(command, facts, reports)]
    headline = _headline(rows, measure)
    page = PAGE.format(title=escaped(title), style=STYLE, headline=headline, body="\n".join(sections))
    path.write_text(page, encoding="utf-8", errors="replace")


def named(row: Row) -> str:
    """An objective with its setting, where there are several."""
    return f"{row['objective']} ({row['setting']})" if row["setting"] else row["objective"]


def axis_name(row: Row) -> str:
    """The same for a figure, on two lines."""
    return "\n".join(axis_label(part, 40) for part in (row["objective"], row["setting"]) if part)


def _headline(rows: Sequence[Row], measure: str) -> str:
    change, p = f"{measure}_change", f"{measure}_p"
    # No difference is tested of text_only.
    rows = [row for row in rows if row[change] is not None and row["objective"] != "text_only"]
    if not rows:
        return "<p class='headline'>There is nothing to compare with standard training here.</p>"
    turned = [row for row in rows if row["iid"] is not None and row["iid"] < 0.5]
    best = max([row for row in rows if row not in turned] or rows, key=lambda row: row[change])
    sure = [row for row in rows if row[p] is not None and row[p] < 0.05]
    better, worse = sum(row[change] > 0 for row in sure), sum(row[change] < 0 for row in sure)
    text = (
        f"{_GAINS[measure].capitalize()} {better} of {len(rows)} are better than {BASELINE} training and {worse} are "
        "worse (Holm's p < .05)."
    )
    if turned:
        text += (
            f" {', '.join(map(named, turned))}: worse than chance in distribution, so what they gain elsewhere comes "
            "of turning the shortcut round; look at tests without a cue."
        )
    others = " of the others" if turned else ""
    more = f"The highest{others} is {named(best)}: {points(best[change])} points"
    if measure != "iid":
        more += f", in distribution {points(best['iid_change'])} points"
    return f"<p class='headline'>{escaped(text)}</p><p class='sub'>{escaped(more)}.</p>"


def _gains(rows: Sequence[Row]) -> str:
    lead = (
        f"Accuracy minus that of {BASELINE} training, in points, with 95 % intervals. Green and red: the difference "
        "stands after Holm's correction."
    )
    figures = []
    for measure, name in _GAINS.items():
        shown = [row for row in rows if row[f"{measure}_change"] is not None]
        if shown:
            alt = "; ".join(f"{named(row)} {points(row[f'{measure}_change'])}" for row in shown)
            figures.append(png_figure(gains(shown, measure), name, f"Change {name} in points: {alt}"))
    content = f"<div class='grid wide'>{''.join(figures)}</div>" if figures else "<p class='empty'>Nothing.</p>"
    return html_section("Gains and losses", lead, content)


def gains(rows: Sequence[Row], measure: str) -> bytes:
    """Differences with their intervals, the best on top."""
    order = sorted(rows, key=lambda row: row[f"{measure}_change"])
    figure = new_figure(5.6, 1.0 + 0.27 * sum(1 + bool(row["setting"]) for row in order))
    axes = figure.add_subplot()
    for y, row in enumerate(order):
        mean, low, high = (row[f"{measure}_change{end}"] for end in ("", "_low", "_high"))
        p = row[f"{measure}_p"]
        colour = _UNSURE if p is None or p >= 0.05 else _BETTER if mean > 0 else _WORSE
        if low is not None:
            axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=1.6)
        axes.plot([100 * mean], [y], "o", color=colour, markersize=5)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(order)), [axis_name(row) for row in order], fontsize=8)
    axes.set_xlabel("points")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return to_png(figure)


def _costs(rows: Sequence[Row], measure: str) -> str:
    shown = [row for row in rows if row["cost"] is not None and row[f"{measure}_change"] is not None]
    lead = f"Gain {_GAINS[measure]} against the time of a run, over that of {BASELINE} training."
    if not shown:
        return html_section("Gain and cost", lead, "<p class='empty'>No times.</p>")
    gained = [f"{points(row[f'{measure}_change'])} points at {row['cost']:.2f} times the time" for row in shown]
    alt = "; ".join(f"{named(row)}: {gain}" for row, gain in zip(shown, gained, strict=True))
    return html_section("Gain and cost", lead, png_figure(gain_against_cost(shown, measure), "", alt))


def gain_against_cost(rows: Sequence[Row], measure: str = "ood") -> bytes:
    """One named dot a row; the gain is that of one measure."""
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for row in rows:
        x, y = row["cost"], 100 * row[f"{measure}_change"]
        axes.plot([x], [y], "o", color="#1d4f91", markersize=5)
        axes.annotate(axis_name(row), (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel(f"time over {BASELINE}")
    axes.set_ylabel(f"gain {_GAINS[measure]} in points")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def _table(rows: Sequence[Row]) -> str:
    lead = (
        "Accuracy in %, averaged over training environments and seeds: i.i.d. on an environment's own test, o.o.d. on "
        "the tests of the others. SFD: what is lost where a text-only model is wrong. Models worse than chance prefer "
        f"what text says is wrong. {legend(rows)}"
    )
    body = ([escaped(cell) for cell in cells(row, rows)] for row in rows)
    return html_section("All numbers", lead, html_table(headings(rows), body))


def _how(command: str, facts: Mapping[str, Any], reports: Mapping[str, str]) -> str:
    links = "".join(
        f"<li><a href='{escaped(file)}'>{escaped(name or 'matrix')}</a></li>" for name, file in reports.items()
    )
    table = html_table(("", ""), ((escaped(name), escaped(value)) for name, value in facts.items()))
    more = f"<h3>The matrix of every point</h3><ul>{links}</ul>"
    return html_section("How it was run", "", f"<pre>{escaped(command)}</pre>{table}{more}")
