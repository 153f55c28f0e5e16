"""The audit on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmrm_jax.audit.study import words_tell
from mmrm_jax.audit.tables import (
    Grid,
    overlap_grid,
    overview,
    repeats_grid,
    style_grid,
    transfer_grid,
    words_grid,
)
from mmrm_jax.audit.verdict import furthest

_FEW = 3  # environments: of more, words and overlaps are in the report alone
_COLOURS = {"none": "green", "weak": "yellow", "clear": "yellow", "strong": "red", "too few": "dim"}


def print_audit(result: Mapping[str, Any], console: Console) -> None:
    """The tables, then the verdict on every environment."""
    environments = result["environments"]
    several, few = len(environments) > 1, len(environments) <= _FEW
    grids = [overview(environments)]
    grids += [transfer_grid(result)] if several else []
    grids += [style_grid(environments)]
    grids += [words_grid(each) for each in environments if words_tell(each)] if few else []
    grids += [repeats_grid(environments)]
    grids += [overlap_grid(result)] if several and few else []
    for grid in grids:
        if grid.rows:
            console.print(_table(grid))
    for each in environments:
        found = each["verdict"]
        console.print(Text.assemble((f"{each['name']}: ", "bold"), (found["level"], _COLOURS[found["level"]])))
        for sentence in found["sentences"]:
            console.print(f"  {sentence}", highlight=False)
    for sentence in result["across"]:
        console.print(sentence, highlight=False)
    if command := furthest(environments)["verdict"]["command"]:
        console.print("a text-only model says more: " + command, soft_wrap=True, highlight=False)
    console.print(result["definition"], highlight=False, style="dim")


def _table(grid: Grid) -> Table:
    table = Table(title=Text(grid.title, "bold"), title_justify="left", box=SIMPLE_HEAD)
    for i, name in enumerate(grid.header):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(
            *(Text.assemble(value, ("\n" * bool(note) + note.replace("; ", "\n"), "dim")) for value, note in row)
        )
    return table
