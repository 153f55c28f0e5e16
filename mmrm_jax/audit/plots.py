"""The audit's drawings as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrm_jax.eval.report_plots import INK, MUTED, axis_label, new_figure, to_png

_FOR, _AGAINST, _CHANCE = "#1d4f91", "#c2410c", 0.5


def rates(rows: Sequence[tuple[str, float | None, float | None, float | None]], label: str) -> bytes:
    """(name, value, low, high) fractions as dots with intervals in percent; coloured where they exclude chance."""
    figure = new_figure(5.4, 0.9 + 0.34 * max(2, len(rows)))
    axes = figure.add_subplot()
    for y, (_, value, low, high) in enumerate(rows):
        if value is None:
            continue
        colour = MUTED
        if low is not None and high is not None:
            colour = _FOR if low > _CHANCE else _AGAINST if high < _CHANCE else MUTED
            axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.55)
        axes.plot([100 * value], [y], "o", color=colour, markersize=5.5)
    axes.axvline(100 * _CHANCE, color=INK, linewidth=0.9, linestyle=":")
    axes.set_yticks(range(len(rows)), [axis_label(name) for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return to_png(figure)


def word_weights(words: Sequence[Mapping[str, Any]]) -> bytes:
    """Weights of the most telling words as bars, those for a response to the right."""
    order = sorted(words, key=lambda word: -word["weight"])
    figure = new_figure(5.4, 0.9 + 0.22 * max(3, len(order)))
    axes = figure.add_subplot()
    weights = [word["weight"] for word in order]
    axes.barh(range(len(order)), weights, color=[_FOR if w > 0 else _AGAINST for w in weights], height=0.7)
    axes.set_yticks(range(len(order)), [axis_label(word["word"]) for word in order], fontsize=8)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_xlabel("weight")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return to_png(figure)
