"""A matrix while it runs: mean accuracy of every objective so far, as a live table or a line a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from mmrm_jax.eval.evaluate import Evaluation
from mmrm_jax.eval.metrics import correctness
from mmrm_jax.eval.summary import cell_kind, percent

Found = dict[str, float]  # "iid", "ood" -> mean accuracy of a model


def accuracies(evaluations: Mapping[str, Evaluation], branch: str, train: str, iid: Mapping[str, str]) -> Found:
    """Accuracy without ties on the model's own test set, and the mean over those of other training environments."""
    by_kind: dict[str, list[float]] = {"iid": [], "ood": []}
    for test, e in evaluations.items():
        kind = cell_kind(train, test, iid)
        if kind in by_kind and not np.all(e.tie):
            by_kind[kind].append(float(np.mean(correctness(e.margins[branch])[~e.tie])))
    return {kind: float(np.mean(values)) for kind, values in by_kind.items() if values}


class Running:
    """The accuracies of finished runs by objective, shown above the bars of `progress` or printed one by one."""

    def __init__(self, console: Console):
        self.console = console
        self.found: dict[str, list[Found]] = {}

    def add(self, objective: str, name: str, found: Found) -> None:
        """Take in a run; where there is no live display, print its line."""
        self.found.setdefault(objective, []).append(found)
        if not self.console.is_terminal:
            self.console.print(f"{name}: i.i.d. {percent(found.get('iid'))}, o.o.d. {percent(found.get('ood'))}")

    def table(self) -> Table:
        """Means over the runs so far."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for heading in ("so far, %", "runs", "i.i.d.", "o.o.d."):
            table.add_column(heading, justify="left" if heading == "so far, %" else "right")
        for objective, runs in self.found.items():
            means = ([run[kind] for run in runs if kind in run] for kind in ("iid", "ood"))
            columns = (percent(float(np.mean(values)) if values else None) for values in means)
            table.add_row(Text(objective), f"{len(runs)}", *columns)
        return table


class TableProgress(Progress):
    """Bars below the table of `running`."""

    running: Running | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The table, where it has rows, and the bars."""
        if self.running is not None and self.running.found:
            yield self.running.table()
        yield from super().get_renderables()
