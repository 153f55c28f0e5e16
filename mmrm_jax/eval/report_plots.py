"""The report's figures as PNG bytes. Figures are drawn through the object API: no pyplot, no global state."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

_DPI = 180
_LABEL = 24  # characters
STYLES = ("-", "--", ":")  # of ten lines each
INK = "#1d2733"
MUTED = "#66717e"


@dataclasses.dataclass(frozen=True)
class SfcHistory:
    """Histograms of the Shortcut-Failure Coefficient over one training run.

    Attributes:
      train: training environment.
      seed: of the run.
      steps: training steps at which the histograms were taken, increasing.
      counts: comparisons per step and bin.
      edges: bin edges, from 0 to 1.

    Raises:
      ValueError: where the shapes do not fit together.
    """

    train: str
    seed: int
    steps: Int[np.ndarray, "..."]
    counts: Float[np.ndarray, "..."] | Int[np.ndarray, "..."]
    edges: Float[np.ndarray, "..."]

    def __post_init__(self) -> None:
        expected = (len(self.steps), len(self.edges) - 1)
        if self.counts.shape != expected:
            raise ValueError(
                f"SFC history of {self.train}, seed {self.seed}: counts have shape {self.counts.shape}, "
                f"{expected[0]} steps and {expected[1]} bins need {expected}"
            )


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a training plot: `values[k]` of `measure` (e.g. "loss") at `steps[k]`, for the run `label`."""

    measure: str
    label: str
    steps: Sequence[int]
    values: Sequence[float]


def heat_map(
    rows: Sequence[Mapping[str, Any]],
    field: Literal["accuracy", "sfd"],
    *,
    trains: Sequence[str],
    tests: Sequence[str],
    iid: Mapping[str, str],
) -> bytes:
    """`draw_heat_map` as a figure of its own."""
    figure = new_figure(1.5 + 0.78 * max(2, len(tests)), 1.2 + 0.52 * max(2, len(trains)))
    draw_heat_map(figure.add_subplot(), rows, field, trains=trains, tests=tests, iid=iid)
    return to_png(figure)


def draw_heat_map(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    field: Literal["accuracy", "sfd"],
    *,
    trains: Sequence[str],
    tests: Sequence[str],
    iid: Mapping[str, str],
) -> None:
    """A train-by-test map of one objective, in percent, i.i.d. cells outlined; the colour scale is always the same.

    Args:
      axes: where to.
      rows: one row a cell (several seeds already averaged); an absent or undefined cell stays white.
      field: "accuracy" (scale 0 to 1 around chance, 1/2) or "sfd" (scale -1 to 1 around 0).
      trains: row order.
      tests: column order.
      iid: training environment -> its own i.i.d. test.
    """
    values = np.full((len(trains), len(tests)), np.nan)
    for row in rows:
        if row["train"] in trains and row["test"] in tests and row[field] is not None:
            values[trains.index(row["train"]), tests.index(row["test"])] = row[field]
    low, high, colours = (0.0, 1.0, "RdBu") if field == "accuracy" else (-1.0, 1.0, "PuOr_r")
    # The ends of the map are too dark for dark numbers: the scale stops short of them.
    middle, reach = (low + high) / 2, 1.35 * (high - low) / 2
    axes.imshow(values, vmin=middle - reach, vmax=middle + reach, cmap=colours, aspect="auto")
    for i, train in enumerate(trains):
        for j, test in enumerate(tests):
            text = "–" if np.isnan(values[i, j]) else f"{100 * values[i, j]:.1f}"
            own = iid.get(train) == test
            ink = "white" if abs(values[i, j] - middle) > 0.85 * (high - low) / 2 else INK
            weight = "bold" if own else "normal"
            axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=11.5, fontweight=weight)
            if own:
                outline = Rectangle((j - 0.47, i - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=1.8)
                axes.add_patch(outline)
    axes.set_xticks(
        range(len(tests)), [axis_label(test) for test in tests], rotation=25, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(trains)), [axis_label(train) for train in trains])
    axes.set_xlabel("tested on")
    axes.set_ylabel("trained on")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def sfc_over_training(history: SfcHistory) -> bytes:
    """Step on x, SFC on y, share of comparisons as colour, and the mean as a line."""
    figure = new_figure(4.6, 3.0)
    axes = figure.add_subplot()
    counts = np.asarray(history.counts, np.float64)
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    centres = (history.edges[:-1] + history.edges[1:]) / 2
    if len(history.steps):
        steps = np.asarray(history.steps, np.float64)
        mesh = axes.pcolormesh(_cell_edges(steps), history.edges, share.T, cmap="Blues", norm=PowerNorm(0.6, vmin=0.0))
        mean = np.where(total[:, 0] > 0, share @ centres, np.nan)
        axes.plot(steps, mean, color="#c2410c", linewidth=1.8, marker="o" if len(steps) == 1 else None, label="mean")
        axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
        bar = figure.colorbar(
            mesh, ax=axes, label="share of comparisons", format=lambda value, _: f"{100 * value:.0f} %"
        )
        bar.outline.set_visible(False)  # type: ignore[operator]
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(float(history.edges[0]), float(history.edges[-1]))
    axes.set_xlabel("training step")
    axes.set_ylabel("SFC")
    return to_png(figure)


def training_curves(curves: Sequence[Curve]) -> bytes:
    """Curves of one measure, one line a run; those of one label look the same."""
    labels = list(dict.fromkeys(curve.label for curve in curves))
    figure = new_figure(4.6, 2.8 + 0.17 * math.ceil(len(labels) / 2))
    axes = figure.add_subplot()
    lines = {}
    for curve in curves:
        look = labels.index(curve.label)
        style = {"color": f"C{look % 10}", "linestyle": STYLES[look // 10 % len(STYLES)], "linewidth": 1.3}
        (lines[curve.label],) = axes.plot(curve.steps, curve.values, **style)
    axes.set_xlabel("training step")
    axes.set_ylabel(axis_label(curves[0].measure))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    names = map(axis_label, lines)
    figure.legend(lines.values(), names, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return to_png(figure)


def pool_seeds(histories: Sequence[SfcHistory]) -> list[tuple[SfcHistory, tuple[int, ...]]]:
    """Adds up the histograms of one environment's seeds where steps and bins agree; with the seeds in each."""
    pooled: list[tuple[SfcHistory, tuple[int, ...]]] = []
    for history in histories:
        for i, (other, seeds) in enumerate(pooled):
            same = np.array_equal(other.steps, history.steps) and np.array_equal(other.edges, history.edges)
            if other.train == history.train and same:
                added = dataclasses.replace(other, counts=other.counts + history.counts)
                pooled[i] = (added, (*seeds, history.seed))
                break
        else:
            pooled.append((history, (history.seed,)))
    return pooled


def _cell_edges(steps: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K1"]:
    """Boundaries half way between the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[:-1] + steps[1:]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axis_label(label: str, most: int = _LABEL) -> str:
    """A label short enough for an axis, of at most so many characters, without what fonts cannot draw or matplotlib
    would read as a formula."""
    short = label if len(label) <= most else label[: most - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in short).replace("$", r"\$")


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
