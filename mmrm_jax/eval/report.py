"""The report of an evaluation: one HTML file that needs no network and no JavaScript.

Prompts and responses are untrusted: all text is escaped, images are decoded and encoded anew, and the page's content
security policy forbids scripts and requests.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmrm_jax.data.records import quarantine_kind
from mmrm_jax.eval.report_page import PAGE, STYLE
from mmrm_jax.eval.report_parts import escaped, html_section, html_table, images_html, png_figure
from mmrm_jax.eval.report_plots import Curve, SfcHistory, heat_map, pool_seeds, sfc_over_training, training_curves
from mmrm_jax.eval.summary import BASELINE, MEASURE_NAMES, between, cell_kind, mean_over_seeds, percent, points
from mmrm_jax.types import Quarantined

_METHOD = "shortcut_aware"
_TOO_SHORT = "Nothing is drawn: the runs were so short that they logged once. A smaller log_every logs more often."


@dataclasses.dataclass(frozen=True)
class SfcExample:
    """One comparison to look at: the encoded images, the texts, and both branches' margins."""

    train: str
    kind: Literal["highest", "lowest"]
    sfc: float
    images: tuple[bytes, ...]
    prompt: str
    chosen: str
    rejected: str
    primary_margin: float
    proxy_margin: float


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything the report shows; any list may be empty.

    Attributes:
      title: of the page.
      command: the command line that made the numbers.
      facts: how it was run: configuration, versions, seconds.
      rows: of `metrics.cell_row`.
      summary: of `summary.summarise`.
      objectives, trains, tests: display order; only what is named here is drawn.
      iid: training environment -> its own i.i.d. test.
      sfc_histories: of the shortcut-aware runs.
      examples: comparisons with the highest and lowest SFC.
      curves: training curves.
      quarantined: rows of the data that could not be used.
    """

    title: str
    command: str
    facts: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    summary: Sequence[Mapping[str, Any]]
    objectives: Sequence[str]
    trains: Sequence[str]
    tests: Sequence[str]
    iid: Mapping[str, str]
    sfc_histories: Sequence[SfcHistory] = ()
    examples: Sequence[SfcExample] = ()
    curves: Sequence[Curve] = ()
    quarantined: Sequence[Quarantined] = ()


def write_report(path: Path, data: ReportData) -> None:
    """Writes the report to `path` (UTF-8 HTML).

    Raises:
      ValueError: where a training environment with rows has no i.i.d. test in `data.iid`.
      OSError: where the file cannot be written.
    """
    sections = (_summary, _matrix, _sfd, _sfc, _curves, _examples, _how, _all_cells)
    body = "\n".join(section(data) for section in sections)
    page = PAGE.format(title=escaped(data.title), style=STYLE, headline=_headline_html(data), body=body)
    # A lone surrogate in a record has no UTF-8 form; it must not cost the report.
    path.write_text(page, encoding="utf-8", errors="replace")


def headline(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, in plain sentences made from the summary's numbers, whichever way they point."""
    if not summary:
        return ["No model has been evaluated yet."]
    compared = [row["objective"] for row in summary if row["versus"] == BASELINE]
    if not compared:
        return ["There is no pair of standard and other training to compare here; the numbers stand below."]
    method = next((name for name in (_METHOD, *compared) if name in compared and name != "text_only"), compared[0])
    name = "Shortcut-aware training" if method == _METHOD else f"Training with {method}"
    changes = (("ood", "out of distribution"), ("iid", "in distribution"), ("other", "on the other tests"))
    found = [(where, pair) for measure, where in changes if (pair := _pair(summary, method, measure))]
    sentences = [_change_sentence("It" if i else name, where, pair) for i, (where, pair) in enumerate(found)]
    sentences += _sfd_sentence(summary, method)
    if not sentences:
        return ["Neither accuracy nor SFD is defined on these tests; the numbers stand below."]
    if max(row["seeds"] for row in summary) < 2 and any(row["low"] is not None for row in summary):
        sentences.append(
            "One seed was run: the intervals say how sure the test sets make us of these models, not of others."
        )
    return sentences


_Pair = tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]


def _pair(summary: Sequence[Mapping[str, Any]], method: str, measure: str) -> _Pair | None:
    """(method, standard, difference) rows of a measure; None unless all three are there and defined."""
    found = {(row["objective"], row["versus"]): row for row in summary if row["measure"] == measure}
    keys = ((method, None), (BASELINE, None), (method, BASELINE))
    rows = [found[key] for key in keys if key in found and found[key]["mean"] is not None]
    return (rows[0], rows[1], rows[2]) if len(rows) == 3 else None


def _change_sentence(subject: str, where: str, pair: _Pair) -> str:
    own, base, change = pair
    verb = {1: "raised", -1: "lowered", 0: "made no measurable difference to"}[_sign(change)]
    levels = f"from {percent(base['mean'])} to {percent(own['mean'])} %"
    return f"{subject} {verb} accuracy {where}: {levels} ({_change(change)}).{_against_chance(own)}"


def _change(change: Mapping[str, Any]) -> str:
    bounds = between(change["low"], change["high"], points)
    return f"{points(change['mean'])} points, " + (
        f"95 % interval {bounds}" if bounds else "too few images for an interval"
    )


def _against_chance(level: Mapping[str, Any]) -> str:
    """What to add to an accuracy that is no better than guessing, which is right in 50 %."""
    if level["low"] is None or level["low"] > 0.5:
        return ""
    return (
        " That is worse than guessing (50 %)."
        if level["high"] < 0.5
        else " That may be no better than guessing (50 %)."
    )


def _sfd_sentence(summary: Sequence[Mapping[str, Any]], method: str) -> list[str]:
    pair = _pair(summary, method, "sfd")
    if pair is None:
        return []
    own, base, change = pair
    verb = {1: "grew", -1: "shrank", 0: "did not measurably change"}[_sign(change)]
    return [
        f"The accuracy lost where text alone misleads (SFD) {verb}: "
        f"from {percent(base['mean'])} to {percent(own['mean'])} points ({_change(change)})."
    ]


def _sign(change: Mapping[str, Any]) -> int:
    """1 or -1 where the interval lies on one side of zero, else 0."""
    if change["low"] is None:
        return 0
    return int(change["low"] > 0) - int(change["high"] < 0)


def _headline_html(data: ReportData) -> str:
    first, *rest = headline(data.summary)
    more = f"<p class='sub'>{escaped(' '.join(rest))}</p>" if rest else ""
    return f"<p class='headline'>{escaped(first)}</p>{more}"


def _with_interval(
    row: Mapping[str, Any] | None, show: Any, low: str = "low", high: str = "high", mean: str = "mean"
) -> str:
    if row is None or row.get(mean) is None:
        return "<span class='muted'>–</span>"
    bounds = "" if row.get(low) is None else f"<small>{between(row[low], row[high], show)}</small>"
    return f"<span class='value'>{show(row[mean])}</span>{bounds}"


def _summary(data: ReportData) -> str:
    lead = (
        "Accuracy in %, averaged over training environments: i.i.d. on an environment's own test, o.o.d. on the tests "
        "of the others. SFD is the accuracy a model loses where a text-only model is wrong: the lower, the less it "
        "leans on text alone. Small numbers are 95 % intervals; differences are in points."
    )
    if not data.summary:
        return html_section("In short", lead, "<p class='empty'>No results.</p>")
    found = {(row["measure"], row["objective"], row["versus"]): row for row in data.summary}
    measures = [m for m in MEASURE_NAMES if any(row["measure"] == m for row in data.summary)]
    rows = []
    for versus in (None, BASELINE):
        for objective in data.objectives:
            cells = [found.get((measure, objective, versus)) for measure in measures]
            if any(cells):
                label = escaped(objective) + (f" <span class='muted'>minus {BASELINE}</span>" if versus else "")
                show = [points if versus and m != "sfd_reduction" else percent for m in measures]
                rows.append([label, *map(_with_interval, cells, show)])
    seeds = max(row["seeds"] for row in data.summary)
    note = f"<p class='muted'>{seeds} seed{'s' if seeds > 1 else ''}.</p>"
    return html_section("In short", lead, html_table(["", *(MEASURE_NAMES[m] for m in measures)], rows) + note)


def _heat_maps(data: ReportData, field: Literal["accuracy", "sfd"], name: str) -> str:
    figures = []
    for objective in data.objectives:
        rows = [row for row in mean_over_seeds(data.rows) if row["objective"] == objective]
        if any(row[field] is not None for row in rows):
            png = heat_map(rows, field, trains=data.trains, tests=data.tests, iid=data.iid)
            cells = "; ".join(f"{row['train']} on {row['test']} {percent(row[field])}" for row in rows)
            figures.append(png_figure(png, objective, f"{name} of {objective} in percent: {cells}"))
    return f"<div class='grid'>{''.join(figures)}</div>" if figures else "<p class='empty'>Nothing measured.</p>"


def _matrix(data: ReportData) -> str:
    lead = (
        "Every model on every test, in %. Blue is better than chance, red worse. Outlined: the environment the "
        "model was trained on. A model that learnt a text cue is blue in the outlined cells and red where the cue is "
        "reversed."
    )
    return html_section("Trained here, tested there", lead, _heat_maps(data, "accuracy", "Accuracy"))


def _sfd(data: ReportData) -> str:
    lead = (
        "Accuracy where the text-only model is right minus accuracy where it is wrong, in points. Near 0 the "
        "model does not care whether text alone would do; near 100 it fails wherever text alone fails. "
        "The text-only model itself is at 100 by definition. A dash: one side is empty."
    )
    return html_section("How much hangs on the text shortcut (SFD)", lead, _heat_maps(data, "sfd", "SFD"))


def _sfc(data: ReportData) -> str:
    lead = (
        "The Shortcut-Failure Coefficient weighs each training comparison: near 1 where text alone fails, 1/2 where "
        "both branches do equally well, near 0 where text alone is enough."
    )
    pooled = pool_seeds(data.sfc_histories)
    figures = []
    for history, seeds in pooled:
        if len(history.steps) < 2:
            continue
        caption = f"{history.train}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        alt = f"Density of the SFC over the training steps on {caption}, with its mean"
        figures.append(png_figure(sfc_over_training(history), caption, alt))
    reason = _TOO_SHORT if pooled else "No objective here weighs by one text-only proxy."
    content = f"<div class='grid'>{''.join(figures)}</div>" if figures else f"<p class='empty'>{reason}</p>"
    return html_section("SFC over training", lead, content)


def _curves(data: ReportData) -> str:
    if not data.curves:
        return ""
    figures = []
    drawn = [curve for curve in data.curves if len(curve.steps) > 1]
    for measure in dict.fromkeys(curve.measure for curve in drawn):
        curves = [curve for curve in drawn if curve.measure == measure]
        alt = f"{measure} over the training steps of {', '.join(dict.fromkeys(c.label for c in curves))}"
        figures.append(png_figure(training_curves(curves), measure, alt))
    content = f"<div class='grid'>{''.join(figures)}</div>" if figures else f"<p class='empty'>{_TOO_SHORT}</p>"
    return html_section("Training", "Accuracy on the training batches, averaged over each logging interval.", content)


def _examples(data: ReportData) -> str:
    lead = (
        "The comparisons of an environment's own test that shortcut-aware training would weigh most and least (its "
        "SFC). d is the margin, chosen minus rejected, of the model that sees the image, b that of the text-only one; "
        "positive is right."
    )
    parts = []
    for train in dict.fromkeys(example.train for example in data.examples):
        for kind in ("highest", "lowest"):
            cards = [_card(e) for e in data.examples if e.train == train and e.kind == kind]
            if cards:
                parts.append(f"<h3>{escaped(train)}: {kind} SFC</h3><div class='grid'>{''.join(cards)}</div>")
    content = "".join(parts) or "<p class='empty'>No comparisons were kept.</p>"
    return html_section("Comparisons with the highest and lowest SFC", lead, content)


def _card(example: SfcExample) -> str:
    return (
        f"<article class='card {example.kind}'>{images_html(example.images, example.prompt)}"
        f"<p class='prompt'>{escaped(example.prompt)}</p>"
        f"<p class='answer good'><b>chosen</b>{escaped(example.chosen)}</p>"
        f"<p class='answer bad'><b>rejected</b>{escaped(example.rejected)}</p>"
        f"<p class='margins'><span>SFC <b>{example.sfc:.2f}</b></span>"
        f"<span title='margin with the image'>d <b>{_signed(example.primary_margin)}</b></span>"
        f"<span title='margin from text alone'>b <b>{_signed(example.proxy_margin)}</b></span></p>"
        f"<p class='meaning'>{escaped(_meaning(example))}</p></article>"
    )


def _signed(margin: float) -> str:
    return f"{margin:+.2f}".replace("-", "−")


def _meaning(example: SfcExample) -> str:
    """Says what the two margins mean together."""
    text, image = (_verdict(margin) for margin in (example.proxy_margin, example.primary_margin))
    finding = f"Both models are {text}" if text == image else f"With the image {image}, from text alone {text}"
    if round(example.sfc, 2) == 0.5:
        return f"{finding}; both fit the label equally well."
    better, weight = ("image", "more") if example.sfc > 0.5 else ("text-only", "less")
    return f"{finding}; the {better} model fits the label better, so this comparison weighs {weight}."


def _verdict(margin: float) -> str:
    return "right" if margin > 0 else "wrong" if margin < 0 else "undecided"


def _how(data: ReportData) -> str:
    parts = [f"<pre>{escaped(data.command)}</pre>"] if data.command else []
    if data.facts:
        parts.append(html_table(("", ""), ((escaped(name), escaped(value)) for name, value in data.facts.items())))
    if data.quarantined:
        counts = collections.Counter((row.file, quarantine_kind(row)) for row in data.quarantined)
        shown = [(escaped(file), escaped(kind), str(n)) for (file, kind), n in counts.most_common(30)]
        rest = len(counts) - len(shown)
        total = len(data.quarantined)
        parts.append(f"<h3>Rows that could not be used: {total}</h3>" + html_table(("file", "reason", "rows"), shown))
        parts.append(f"<p class='muted'>and {rest} more kinds</p>" if rest else "")
    return html_section("How it was run", "", "".join(parts))


def _all_cells(data: ReportData) -> str:
    header = (
        "objective",
        "train",
        "test",
        "",
        "seed",
        "n",
        "accuracy",
        "SFD",
        "text right",
        "n",
        "text wrong",
        "n",
        "mean d",
    )
    rows = []
    for row in data.rows:
        margin = row.get("mean_margin")
        rows.append(
            (
                *(escaped(row[field]) for field in ("objective", "train", "test")),
                {"iid": "i.i.d.", "ood": "o.o.d.", "other": ""}[cell_kind(row["train"], row["test"], data.iid)],
                escaped(row["seed"]),
                escaped(row["n"]),
                _with_interval(row, percent, "accuracy_low", "accuracy_high", "accuracy"),
                _with_interval(row, points, "sfd_low", "sfd_high", "sfd"),
                percent(row["accuracy_shortcut_right"]),
                "–" if row["n_shortcut_right"] is None else escaped(row["n_shortcut_right"]),
                percent(row["accuracy_shortcut_wrong"]),
                "–" if row["n_shortcut_wrong"] is None else escaped(row["n_shortcut_wrong"]),
                "–" if margin is None else _signed(margin),
            )
        )
    table = f"<details><summary>Show {len(rows)} rows</summary>{html_table(header, rows)}</details>"
    lead = "One row for each trained model and test, with both terms of the SFD and the sizes they rest on."
    return html_section("All numbers", lead, table if rows else "<p class='empty'>No results.</p>")
