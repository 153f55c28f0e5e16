"""Live progress on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

P = TypeVar("P", bound=Progress)


def make_progress(console: Console, kind: type[P] = Progress) -> P:
    """A bar with step, loss, accuracy, mean SFC, throughput and time left."""
    return kind(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def task(
    progress: Progress, name: str, steps: int, *, start: int = 0, keep: bool = False, lines: bool = False
) -> Iterator[Callable]:
    """A bar for one run that begins after step `start`; yields the `report` function the training loop calls.

    With `lines` a log, which shows no bar, gets a line at every report.
    """
    bar = progress.add_task(name, total=steps, completed=start, metrics="compiling" if start < steps else "")
    lines = lines and not progress.console.is_terminal

    def report(step: int, metrics: dict[str, Any]) -> None:
        progress.update(bar, completed=step, metrics=describe(metrics))
        if lines:
            progress.console.print(f"{name} {step}/{steps}  {describe(metrics)}", soft_wrap=True, highlight=False)

    yield report
    if not keep:
        progress.remove_task(bar)


def describe(metrics: dict[str, Any]) -> str:
    """The metrics that fit on one line; None is one that is undefined."""
    parts = [f"loss {metrics['loss']:.3f}"]
    found = {k.split("/")[0]: v for k, v in metrics.items() if k.endswith("/accuracy") and k.count("/") == 1}
    accuracies = {name: value for name, value in found.items() if value is not None}
    sizes = {name: f" (n = {metrics[f'{name}/n']})" for name in accuracies if f"{name}/n" in metrics}
    parts += [f"{name} {100 * value:.1f} %{sizes.get(name, '')}" for name, value in accuracies.items()]
    if "sfc" in metrics:
        parts.append(f"SFC {metrics['sfc']:.2f}")
    parts.append(f"{metrics['groups'] / max(metrics['seconds'], 1e-9):.0f} groups/s")
    return "  ".join(parts)
