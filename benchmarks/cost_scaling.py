"""What a training step of mmrm_jax costs: by comparisons, by responses, by objective. Needs no torch.

    python benchmarks/cost_scaling.py --size big --plot scaling.png --json scaling.json

Comparisons index responses that are run anyway, so more of them should cost nothing; responses cost their tokens. The
shortcut-aware step is put beside the standard one, with a proxy that sees no image, and beside one of the same two
branches without the weights (SFC), whose own computation is timed, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import CONSOLE, SIZES, Options, interleaved, make_examples, saved_model, write
from rich.table import Table

MOST = 8  # responses where comparisons are counted


@dataclasses.dataclass(frozen=True)
class ScalingOptions(Options):
    """Attributes:
    plot: PNG of step time by comparisons and by responses.
    comparisons: How many to measure, of groups of eight responses.
    responses: How many to measure, of groups with one comparison.
    """

    plot: Path | None = None
    comparisons: tuple[int, ...] = (1, 4, 10, 28)
    responses: tuple[int, ...] = (2, 4, 8, 16)


def training(folder: Path, options: Options, responses: int, comparisons: int, objective: str = "standard") -> Any:
    from ours import Training

    from mmrm_jax.config import TrainConfig

    pairs = list(itertools.combinations(range(responses), 2))[:comparisons]
    examples = make_examples(SIZES[options.size], responses, pairs, "absent")
    return Training(folder, examples, TrainConfig(objective=objective, batch_size=len(examples)))


def timed(sides: Mapping[Any, Any], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each step, in turn, after one that compiles it."""
    for side in sides.values():
        side.step()
    return interleaved({key: side.step for key, side in sides.items()}, repeats)


def fitted(seconds: Mapping[float, list[float]]) -> dict[str, Any]:
    """A line through the medians; the slope is also given as a share of the step at the left end."""
    x, y = list(seconds), [float(np.median(s)) for s in seconds.values()]
    slope, intercept = np.polyfit(x, y, 1)
    return {
        "x": x,
        "median_s": y,
        "slope_s": float(slope),
        "intercept_s": float(intercept),
        "share": float(slope / y[0]),
    }


def by_tokens(sides: Mapping[int, Any], seconds: Mapping[int, list[float]]) -> dict[float, list[float]]:
    """The same by tokens of responses in the batch, padding included."""
    return {float(sides[n].batch.responses.tokens.size): s for n, s in seconds.items()}


def sfc_seconds(count: int, repeats: int = 200) -> float:
    """Losses and weights of `count` comparisons as a call of its own: more than they cost inside a step."""
    import jax

    from mmrm_jax.objectives import Seen, shortcut_aware
    from mmrm_jax.types import Comparisons

    index = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    comparisons = Comparisons(index, np.zeros(count, np.float32), np.zeros(count, bool), np.ones(count, bool))  # type: ignore
    rewards = {b: np.linspace(-1, 1, 2 * count, dtype=np.float32).reshape(count, 2) for b in ("primary", "proxy")}
    weigh = jax.jit(lambda r, c: shortcut_aware().terms(Seen(r, c)).loss)
    jax.block_until_ready(weigh(rewards, comparisons))
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(weigh(rewards, comparisons))
    return (time.perf_counter() - start) / repeats


def objectives(folder: Path, options: Options) -> dict[str, Any]:
    """Shortcut-aware pairs beside standard ones, and beside both branches without weights."""
    specs = {"standard": "standard", "unweighted": "lff:q=0,weighted=false", "shortcut_aware": "shortcut_aware"}
    sides = {name: training(folder, options, 2, 1, spec) for name, spec in specs.items()}
    seconds = timed(sides, options.repeats)
    median = {name: float(np.median(s)) for name, s in seconds.items()}
    paired = np.asarray(seconds["shortcut_aware"]) / np.asarray(seconds["unweighted"])
    alone = sfc_seconds(SIZES[options.size].groups)
    return {
        "seconds": seconds,
        "median_s": median,
        "over_standard": median["shortcut_aware"] / median["standard"],
        "over_unweighted": float(np.median(paired)),
        "sfc_alone_s": alone,
        "sfc_share": alone / median["shortcut_aware"],
    }


def show(results: Mapping[str, Any], size: str) -> None:
    table = Table("", "", "median, s", title=f"Training step of mmrm_jax, {size}")
    for name, unit in (("comparisons", "comparisons a group"), ("responses", "responses a group")):
        r = results[name]
        for x, y in zip(r["x"], r["median_s"]):
            table.add_row(f"{x:g} {unit}", "", f"{y:.3g}")
        table.add_row("", f"each more: {1e3 * r['slope_s']:.3g} ms, {100 * r['share']:.2g} % of the first", "")
    tokens, o = results["response_tokens"], results["objectives"]
    table.add_row("", f"each 1000 response tokens more: {1e3 * tokens['slope_s']:.3g} s", "")
    for name, median in o["median_s"].items():
        table.add_row(name.replace("_", "-"), "", f"{median:.3g}")
    table.add_row("", f"shortcut-aware over standard: {o['over_standard']:.3f}x", "")
    table.add_row("", f"over the same branches without weights: {o['over_unweighted']:.3f}x", "")
    table.add_row("", f"losses and weights alone: {1e6 * o['sfc_alone_s']:.0f} us, {100 * o['sfc_share']:.2g} %", "")
    CONSOLE.print(table)


def plot(results: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("comparisons", "responses")):
        r = results[name]
        axes.plot(r["x"], r["median_s"], "o")
        axes.plot(r["x"], np.asarray(r["x"]) * r["slope_s"] + r["intercept_s"])
        axes.set(xlabel=f"{name} a group", ylabel="seconds a step", ylim=(0, None))
    figure.savefig(file, dpi=150)


def main() -> None:
    """The measurements as a table, a plot and JSON."""
    options = tyro.cli(ScalingOptions, description=__doc__)
    with saved_model(options) as folder:
        results: dict[str, Any] = {"objectives": objectives(folder, options)}
        sides = {c: training(folder, options, MOST, c) for c in options.comparisons}
        results["comparisons"] = fitted(timed(sides, options.repeats))
        sides = {n: training(folder, options, n, 1) for n in options.responses}
        seconds = timed(sides, options.repeats)
        results |= {"responses": fitted(seconds), "response_tokens": fitted(by_tokens(sides, seconds))}
    show(results, options.size)
    if options.plot:
        plot(results, options.plot)
    write(options, {"results": results})


if __name__ == "__main__":
    main()
