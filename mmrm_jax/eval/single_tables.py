"""What a run says at its end, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mmrm_jax.eval.summary import between, percent
from mmrm_jax.objectives import Objective

_SEES = {
    "proxy": "the text-only proxy",
    "image_only": "the image-only proxy",
    "multimodal": "the proxy, which sees all",
}


def training_table(objective: Objective, history: Sequence[Mapping[str, Any]]) -> Table:
    """The last entry of metrics.jsonl in plain words: its training steps, and the held-out part where there is one.

    Training's numbers are means over the steps since the entry before, on batches as they were met; n: comparisons.
    """
    entry, model = history[-1], objective.scores
    before = history[-2]["step"] if len(history) > 1 else 0
    held_out = "validation/accuracy" in entry
    table = Table(title=f"{objective.name} after {entry['step']} steps", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    table.add_column(f"training, last {entry['step'] - before} steps", justify="right")
    if held_out:
        table.add_column(f"held out, n = {entry['validation/n']}", justify="right")

    def add(name: str, trained: str, measured: str = "–") -> None:
        table.add_row(name, trained, *([measured] if held_out else []))

    def number(key: str) -> str:
        return "–" if entry.get(key) is None else f"{entry[key]:.3f}".replace("-", "−")

    def share(key: str) -> str:
        return "–" if entry.get(key) is None else f"{percent(entry[key])} %"

    add("accuracy", share(f"{model}/accuracy"), share("validation/accuracy"))
    low, high = (entry.get(f"validation/accuracy_{end}") for end in ("low", "high"))
    if interval := between(low, high, percent):
        add("  its 95 % interval", "–", f"{interval} %")
    for branch, view in objective.branches.items():
        if branch != model:
            add(f"accuracy of {_SEES.get(view, branch)}", share(f"{branch}/accuracy"))
    add("its Bradley-Terry loss, nats", number(f"{model}/loss"))
    add("margin, chosen − rejected", number(f"{model}/margin"), number("validation/mean_margin"))
    if "sfc" in entry:
        add("SFC, the mean weight", number("sfc"), number("validation/sfc_mean"))
        add("SFD, points", "–", percent(entry.get("validation/sfd")))
    return table
