"""Over-optimisation: what a reward model's favourites are worth, by best-of-n and under a policy that is trained on it.

    mmrm ablate configs/ablate_objectives.py
    python benchmarks/over_optimisation.py runs/ablate-objectives/all --plot over_optimisation.png

Models are the cells of a matrix on the shapes world, which knows which answers are right: that is the gold reward. Each
scores 64 candidate answers to 256 new questions, right or wrong by a fair coin, plain, long or hedged alike. Best-of-n
picks the favourite of n; the policy gradient moves a policy that can learn to be right, long or hedged. Gold is drawn
against the KL divergence from the policy that both begin with. Means over training environments and seeds, with
95 % intervals over these models.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats

from mmrm_jax.ablate.policy import policy_path
from mmrm_jax.config import MeshConfig
from mmrm_jax.data.shapes import STYLES, Candidates, encode_png, sample_candidates
from mmrm_jax.eval.best_of import best_of_kl, doubling, expected_best
from mmrm_jax.eval.report_plots import new_figure, to_png
from mmrm_jax.eval.saved_run import read_run
from mmrm_jax.eval.scorer import Scorer
from mmrm_jax.models.lora import fold_adapters
from mmrm_jax.sharding import make_mesh
from mmrm_jax.train.state import merge_branch

CHECKPOINTS = np.linspace(0.0, 1.75, 15)  # of KL, in nats, at which paths of policies are averaged


@dataclasses.dataclass(frozen=True)
class OverOptimisation:
    """Attributes:
    matrix: Directory of a matrix on the shapes world, whose cells are the reward models.
    objectives: Which of its objectives.
    prompts: New questions.
    responses: Candidate answers to each.
    phrasings: Of answers to a question; None is all there are.
    seed: Of the questions and answers.
    plot: PNG file to draw to.
    json: File for the numbers.
    """

    matrix: Annotated[Path, tyro.conf.Positional]
    objectives: tuple[str, ...] = ("standard", "shortcut_aware")
    prompts: int = 256
    responses: int = 64
    phrasings: int | None = None
    seed: int = 0
    plot: Path | None = None
    json: Path | None = None


def scorer_of(cell: Path, console: Console, like: Scorer | None) -> Scorer:
    """The reward model that a cell ended with; in `like`, where there is one, whose compiled steps it can use."""
    run = read_run(cell)
    state, _ = run.restore(console)
    branch = run.program.objective.scores
    params = {"primary": fold_adapters(merge_branch(state.params[branch], state.frozen))}
    views = {"primary": run.program.views[branch]}
    if like is None:
        return Scorer(run.checkpoint, params, make_mesh(MeshConfig()), views=views, dtype="float32", batch_size=16)
    if like.views != views:
        raise SystemExit(f"{cell} sees {views['primary']}, the models before it {like.views['primary']}")
    like.params = params
    return like


def study(rewards: np.ndarray, asked: list[Candidates], ns: list[int]) -> dict[str, Any]:
    """What best-of-n gives for each n, and the policy's path at each of CHECKPOINTS: gold, styles, and the reward."""
    gold = np.asarray([c.right for c in asked], np.float64)
    styles = {style: np.asarray([[s == style for s in c.style] for c in asked], np.float64) for style in STYLES}
    values = {"gold": gold, "long": styles["long"], "hedged": styles["hedged"], "reward": rewards / np.std(rewards)}
    best = {
        name: np.mean([expected_best(r, v, ns) for r, v in zip(rewards, value, strict=True)], axis=0)
        for name, value in values.items()
    }
    path = policy_path(
        np.stack([gold, styles["long"], styles["hedged"]], axis=2), rewards, values, steps=2000, rate=0.05
    )
    reached = path.kl.max()
    policy = {
        name: np.where(reached >= CHECKPOINTS, np.interp(CHECKPOINTS, path.kl, value), np.nan)
        for name, value in path.values.items()
    }
    return {"best of n": best, "policy": policy}


def averaged(studies: list[dict[str, Any]], way: str, name: str) -> dict[str, list[float | None]]:
    """The mean over models, and its 95 % interval by Student's t, where all models got that far."""
    values = np.stack([each[way][name] for each in studies])
    mean, reach = values.mean(axis=0), np.zeros(values.shape[1])
    if len(values) > 1:
        reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0)
    columns = {"mean": mean, "low": mean - reach, "high": mean + reach}
    return {key: [None if np.isnan(x) else float(x) for x in column] for key, column in columns.items()}


def draw(result: dict[str, Any]) -> bytes:
    """Gold and the share of long answers against KL, for best-of-n and for the policy."""
    figure = new_figure(9.0, 6.0)
    axes = figure.subplots(2, 2, sharex="col")
    for column, way in enumerate(("best of n", "policy")):
        for row, name in enumerate(("gold", "long")):
            place = axes[row][column]
            for objective, found in result["objectives"].items():
                line = found[way][name]
                kept = [i for i, mean in enumerate(line["mean"]) if mean is not None]
                x = [result["kl"][way][i] for i in kept]
                place.plot(x, [line["mean"][i] for i in kept], marker="o", markersize=3, label=objective)
                ends = (np.clip([line[end][i] for i in kept], 0.0, 1.0) for end in ("low", "high"))  # of shares
                place.fill_between(x, *ends, alpha=0.2)
            place.set_title(f"{way}: {'right answers' if name == 'gold' else 'long answers'}", fontsize=10)
            place.set_ylabel("share", fontsize=9)
            place.set_xlabel("KL from the first policy, nats", fontsize=9)
    axes[0][0].legend(fontsize=8)
    return to_png(figure)


def table(result: dict[str, Any], way: str) -> Table:
    """Gold, and how far to its interval's ends at most, at every n or every other KL."""
    step = 1 if way == "best of n" else 2
    found = Table(title=f"right answers, %: {way}", title_justify="left", padding=(0, 0))
    found.add_column("n" if way == "best of n" else "KL", no_wrap=True)
    for value in result["ns"] if way == "best of n" else result["kl"][way][::step]:
        found.add_column(f"{value:g}", justify="right", no_wrap=True)
    for objective, ways in result["objectives"].items():
        line = ways[way]["gold"]
        ends = zip(line["mean"][::step], line["low"][::step], line["high"][::step], strict=True)
        cells = ("–" if m is None else f"{100 * m:.1f}±{100 * max(high - m, m - low):.1f}" for m, low, high in ends)
        found.add_row(objective, *cells)
    return found


def main() -> None:
    """Score, measure, print; draw and write what is asked for."""
    args = tyro.cli(OverOptimisation, description=__doc__)
    console, quiet = Console(), Console(quiet=True)
    rng = np.random.default_rng(args.seed)
    asked = [sample_candidates(rng, args.responses, args.phrasings) for _ in range(args.prompts)]
    requests = [(encode_png(c.pixels), c.prompt, c.responses) for c in asked]
    ns = doubling(args.responses)
    studies: dict[str, list[dict[str, Any]]] = {}
    scorer: Scorer | None = None
    for objective in args.objectives:
        cells = sorted(c for c in (args.matrix / "cells").iterdir() if c.name.rsplit("-", 2)[0] == objective)
        if not cells:
            raise SystemExit(f"{args.matrix} has no cells of {objective}")
        for cell in track(cells, f"{objective}: {len(cells)} models", console=console, disable=not console.is_terminal):
            scorer = scorer_of(cell, quiet, scorer)
            rewards = np.stack(scorer.score_many(requests)).astype(np.float64)
            studies.setdefault(objective, []).append(study(rewards, asked, ns))
    kl = {"best of n": [best_of_kl(n) for n in ns], "policy": CHECKPOINTS.tolist()}
    names = ("gold", "long", "hedged", "reward")
    found = {
        objective: {way: {name: averaged(each, way, name) for name in names} for way in kl}
        for objective, each in studies.items()
    }
    result = {"ns": ns, "kl": kl, "models": {o: len(each) for o, each in studies.items()}, "objectives": found}
    for way in kl:
        console.print(table(result, way))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        args.plot.write_bytes(draw(result))


if __name__ == "__main__":
    main()
