"""A finished matrix as rows, terminal tables, JSON and report."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mmrm_jax.config import MatrixConfig, TrainConfig, to_json
from mmrm_jax.data.records import summarise_quarantine
from mmrm_jax.eval.matrix import PROXY, Matrix, scores
from mmrm_jax.eval.metrics import cell_row, named_rng
from mmrm_jax.eval.report import ReportData, SfcExample, headline, write_report
from mmrm_jax.eval.report_plots import Curve, SfcHistory
from mmrm_jax.eval.summary import format_matrix, summarise
from mmrm_jax.files import write_atomic
from mmrm_jax.objectives import find_objective
from mmrm_jax.train.step import SFC_BINS
from mmrm_jax.types import Quarantined

EXAMPLES = 3  # comparisons shown at each end of the SFC scale, per environment


def publish(matrix: Matrix, console: Console, command: str) -> dict[str, Any]:
    """Print the tables, write `results.json` and `report.html` into the run directory; returns the results."""
    config = matrix.config
    cells = sorted(scores(matrix), key=lambda c: (c.seed, config.objectives.index(c.objective)))
    rows = [cell_row(cell, named_rng(cell.name)) for cell in cells]
    summary = summarise(cells, matrix.data.iid)
    for table in format_matrix(rows, summary, iid=matrix.data.iid):
        console.print(table)
    if config.modifiers:
        console.print(modified(config))
    for sentence in headline(summary):
        console.print(sentence)
    unreadable = _unreadable(matrix)
    if unreadable:
        console.print(f"unreadable while running, left out:\n{summarise_quarantine(unreadable)}")
    training = _training_seconds(matrix)
    result = {
        "rows": rows,
        "summary": summary,
        "training_seconds": training,
        "seconds": matrix.seconds,
        "unreadable": [dataclasses.asdict(entry) for entry in unreadable],
        "config": to_json(config),
    }
    write_atomic(config.out / "results.json", json.dumps(result, indent=1) + "\n")
    report = config.out / "report.html"
    write_report(report, _report_data(matrix, rows, summary, command))
    console.print(f"{training:.0f} s of training, {matrix.seconds:.0f} s in this command; report: {report}")
    return result


def modified(config: MatrixConfig) -> str:
    """What the modifiers change: all objectives, but for a text-only model that is the proxy of another run."""
    said = f"Every objective is trained with {', '.join(config.modifiers)}"
    others = [each for each in config.modifiers if each.partition(":")[0] != "margin"]
    if others and {"text_only", "shortcut_aware"} <= set(config.objectives):
        said += "; the text-only model is the proxy of shortcut_aware, whose loss has target margins at most"
    return said + "."


def _report_data(matrix: Matrix, rows: list[dict], summary: list[dict], command: str) -> ReportData:
    config = matrix.config
    facts = {
        "model": str(config.model or "the tiny InternVL in the package"),
        "data": ", ".join(f"{e.name}: {e.train or '-'} / {e.test}" for e in config.environments),
        "tested on": config.on,
        "seeds": str(config.seeds),
        "training": f"{_length(config.train)}, {config.train.batch_size} groups a step",
        "learning rate": str(config.train.optimizer.learning_rate),
        "modifiers": ", ".join(config.modifiers) or "none",
        "proxy input": config.train.proxy_input,
        "frozen": ", ".join(config.train.freeze) or "nothing",
        "training seconds": f"{_training_seconds(matrix):.0f}, all runs together",
        "seconds of this command": f"{matrix.seconds:.0f}",
        "versions": versions(),
    }
    return ReportData(
        title=config.title,
        command=command,
        facts=facts,
        rows=rows,
        summary=summary,
        objectives=config.objectives,
        trains=list(matrix.data.train),
        tests=list(matrix.data.test),
        iid=matrix.data.iid,
        sfc_histories=_sfc_histories(matrix),
        examples=_examples(matrix),
        curves=_curves(matrix),
        quarantined=[*matrix.data.quarantined, *_unreadable(matrix)],
    )


def _unreadable(matrix: Matrix) -> list[Quarantined]:
    """The groups that any of the runs met and could not read, each once."""
    return list(dict.fromkeys(entry for r in matrix.results for entry in r.unreadable))


def _training_seconds(matrix: Matrix) -> float:
    """Summed over the runs, those of earlier commands and other processes included."""
    return sum(r.seconds for r in matrix.results)


def _length(config: TrainConfig) -> str:
    return f"{config.epochs:g} epochs" if config.steps is None else f"{config.steps} steps"


def versions() -> str:
    """Versions that numbers depend on."""
    import flax

    import mmrm_jax

    return f"mmrm_jax {mmrm_jax.__version__}, jax {jax.__version__}, flax {flax.__version__}, {jax.default_backend()}"


def _sfc_histories(matrix: Matrix) -> list[SfcHistory]:
    edges = np.linspace(0.0, 1.0, SFC_BINS + 1)
    return [
        SfcHistory(
            train=r.cell.train,
            seed=r.cell.seed,
            steps=np.asarray([h["step"] for h in r.history]),
            counts=np.asarray([h["sfc/histogram"] for h in r.history]),
            edges=edges,
        )
        for r in matrix.results
        if r.cell.objective == _weighing(matrix) and r.history and "sfc/histogram" in r.history[0]
    ]


def _weighing(matrix: Matrix) -> str | None:
    """The first objective whose coefficients weigh by one text-only proxy: those that the report shows."""
    for name in matrix.config.objectives:
        objective = find_objective(name)
        if objective.weigh is not None and dict(objective.branches) == {objective.scores: "multimodal", PROXY: "proxy"}:
            return name
    return None


def _curves(matrix: Matrix) -> list[Curve]:
    curves = []
    for r in matrix.results:
        steps = [h["step"] for h in r.history]
        for key in r.history[0]:
            if key.endswith("/accuracy"):
                branch = key.split("/")[0]
                label = f"{r.cell.objective} {r.cell.train}"
                curves.append(Curve(f"{branch} accuracy", label, steps, [h[key] for h in r.history]))
    return curves


def _examples(matrix: Matrix) -> list[SfcExample]:
    """The extremes of every environment's own test set, label ties apart, under its first shortcut-aware model."""
    examples = []
    for r in matrix.results:
        own = matrix.data.iid[r.cell.train]
        e = r.evaluations[own]
        if r.cell.seed != 0 or r.cell.objective != _weighing(matrix) or e.sfc is None:
            continue
        order = np.argsort(e.sfc, kind="stable")
        order = order[~e.tie[order]]  # neither response of a tie is the chosen one
        for kind, chosen in (("highest", order[::-1][:EXAMPLES]), ("lowest", order[:EXAMPLES])):
            for c in chosen:
                group = matrix.data.test[own].group(int(e.group[c]))
                examples.append(
                    SfcExample(
                        train=r.cell.train,
                        kind=kind,  # type: ignore[arg-type]
                        sfc=float(e.sfc[c]),
                        images=group.encoded_images(),
                        prompt=group.asked,
                        chosen=group.responses[e.winner[c]],
                        rejected=group.responses[e.loser[c]],
                        primary_margin=float(e.margins["primary"][c]),
                        proxy_margin=float(e.margins[PROXY][c]),
                    )
                )
    return examples
