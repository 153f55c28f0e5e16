"""`mmrm ablate`: run every point of the grid, then tables in four forms and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import mmrm_jax
from mmrm_jax.ablate.grid import Point, points
from mmrm_jax.ablate.page import write_page
from mmrm_jax.ablate.statistics import cost_rows, outcomes, summary_rows
from mmrm_jax.ablate.tables import as_csv, as_latex, as_markdown, legend, table_rows, terminal_table
from mmrm_jax.config import AblateConfig, Environment, MatrixConfig, to_json
from mmrm_jax.data.shapes import WorldRates
from mmrm_jax.eval.matrix import check_matrix, run_matrix
from mmrm_jax.eval.publish import publish, versions
from mmrm_jax.eval.quickstart import with_shapes_world
from mmrm_jax.eval.summary import BASELINE

WIDE = 120  # columns


def run_ablation(config: AblateConfig, console: Console, command: str) -> dict[str, Any]:
    """Run what is not finished yet, and write results.json, table.md, table.tex, table.csv and report.html.

    Raises ValueError as `points` and `run_matrix` do, before anything is trained.
    """
    start = time.monotonic()
    grid = points(config)
    for point in grid:
        check_matrix(point.config.matrix)
    if BASELINE not in config.matrix.objectives:
        note = f"{BASELINE} is not among the objectives: there will be levels, and no differences from it"
        console.print(note, style="yellow")
    out = config.matrix.out
    matrices = []
    for number, point in enumerate(grid, 1):
        if len(grid) > 1:
            console.print(f"point {number} of {len(grid)}: {point.name}", style="bold")
        matrix = run_matrix(matrix_config(point, out / "data"), console)
        publish(matrix, Console(quiet=True), command)
        matrices.append(matrix)
    found = outcomes(grid, matrices)
    summary, costs = summary_rows(found, config.resamples), cost_rows(found)
    rows = table_rows(summary, costs)
    facts = {
        "points": len(grid),
        "seeds": config.matrix.seeds,
        "resamples": config.resamples,
        "versions": versions(),
        "code": code_version(),
        "training seconds": round(sum(r.seconds for m in matrices for r in m.results)),
        "seconds of this command": round(time.monotonic() - start),
    }
    result = {"facts": facts, "table": rows, "summary": summary, "costs": costs, "config": to_json(config)}
    _write(out / "results.json", json.dumps(result, indent=1) + "\n")
    title = config.matrix.title
    _write(out / "table.md", as_markdown(rows))
    _write(out / "table.tex", as_latex(rows, title))
    _write(out / "table.csv", as_csv(rows))
    write_page(out / "report.html", title, command, facts, rows, {p.name: f"{p.folder}/report.html" for p in grid})
    # A log has no width that a table would have to keep to.
    wide = console if console.is_terminal else Console(file=console.file, quiet=console.quiet, width=WIDE, markup=False)
    for point in grid:
        wide.print(terminal_table(rows, point.name))
    console.print(legend(rows, intervals=False))
    console.print(f"tables: {out}/table.md, .tex, .csv; report: {out}/report.html", soft_wrap=True)
    return result


def matrix_config(point: Point, data: Path) -> MatrixConfig:
    """The matrix of a point, in a folder of its own; the shapes world is rendered where it names no environments."""
    config, shapes = point.config.matrix, point.config.shapes
    config = dataclasses.replace(config, out=config.out / point.folder)
    if config.environments:
        return config
    rates = WorldRates(shapes.cue_agreement, shapes.label_noise, shapes.image_noise)
    config = with_shapes_world(config, data, shapes.comparisons, rates)
    return config if shapes.left_out is None else leave_out(config, shapes.left_out)


def leave_out(config: MatrixConfig, name: str) -> MatrixConfig:
    """The matrix with a single training set, all but environment `name`, whose test set stays, as do those of others
    without one."""
    rest = [e for e in config.environments if e.train is not None and e.name != name]
    together = Environment(
        "+".join(e.name for e in rest),
        train="+".join(e.train for e in rest if e.train is not None),
        test="+".join(e.test for e in rest),
        validation="+".join(e.validation or "" for e in rest) if all(e.validation for e in rest) else None,
    )
    tests = [dataclasses.replace(e, train=None) for e in config.environments if e not in rest]
    return dataclasses.replace(config, environments=(together, *tests))


def code_version() -> str:
    """The package's version, and the first 12 digits of a SHA-256 of its source files."""
    digest = hashlib.sha256()
    root = Path(mmrm_jax.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{mmrm_jax.__version__}, source {digest.hexdigest()[:12]}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
