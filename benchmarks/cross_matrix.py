"""The cross-distribution matrix: what a model trained in one environment makes of the others.

    mmrm ablate configs/ablate_objectives.py
    python benchmarks/cross_matrix.py runs/ablate-objectives/all/results.json --plot docs/images/cross_matrix.png

Accuracy above, SFD below, a column for each objective, means over the seeds of a matrix; printed as Markdown, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mmrm_jax.eval.report_plots import draw_heat_map, new_figure, to_png
from mmrm_jax.eval.summary import mean_over_seeds, percent


@dataclasses.dataclass(frozen=True)
class CrossMatrix:
    """Attributes:
    results: results.json of a matrix.
    objectives: Which of its objectives.
    plot: PNG file to draw to.
    """

    results: Annotated[Path, tyro.conf.Positional]
    objectives: tuple[str, ...] = ("standard", "shortcut_aware")
    plot: Path | None = None


def as_markdown(rows: Sequence[Mapping[str, Any]], trains: Sequence[str], tests: Sequence[str]) -> str:
    """A line for each objective and training environment: accuracy on every test, and SFD in brackets."""
    lines = [f"| objective | trained on | {' | '.join(tests)} |", "|---|---|" + "---:|" * len(tests)]
    for objective in dict.fromkeys(row["objective"] for row in rows):
        for train in trains:
            cells = {r["test"]: r for r in rows if r["objective"] == objective and r["train"] == train}
            shown = [f"{percent(cells[t]['accuracy'])} ({percent(cells[t]['sfd'])})" for t in tests]
            lines.append(f"| {objective} | {train} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], trains: Sequence[str], tests: Sequence[str]) -> bytes:
    """The heat maps; a model's own environment is outlined."""
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    figure = new_figure(3.9 * len(objectives), 5.6)
    panels = figure.subplots(2, len(objectives), squeeze=False)
    for line, (field, name) in zip(panels, (("accuracy", "accuracy, %"), ("sfd", "SFD, points")), strict=True):
        for axes, objective in zip(line, objectives, strict=True):
            own = [row for row in rows if row["objective"] == objective]
            draw_heat_map(axes, own, field, trains=trains, tests=tests, iid={t: t for t in trains})  # type: ignore[arg-type]
            axes.set_title(f"{objective}: {name}", fontsize=10)
    return to_png(figure)


def main(options: CrossMatrix) -> None:
    found = json.loads(options.results.read_text())["rows"]
    rows = [row for name in options.objectives for row in mean_over_seeds(found) if row["objective"] == name]
    if not rows:
        known = ", ".join(dict.fromkeys(row["objective"] for row in found))
        raise SystemExit(f"{options.results} has none of {', '.join(options.objectives)}; it has {known}")
    trains, tests = (list(dict.fromkeys(row[key] for row in rows)) for key in ("train", "test"))
    Console().print(as_markdown(rows, trains, tests), soft_wrap=True, markup=False)
    if options.plot is not None:
        options.plot.write_bytes(draw(rows, trains, tests))


if __name__ == "__main__":
    main(tyro.cli(CrossMatrix, description=__doc__))
