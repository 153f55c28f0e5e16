"""Where shortcut-aware training helps and where it hurts: exact in the two-feature model, and as measured.

    python benchmarks/regime_map.py --plot regime.png
    python benchmarks/regime_map.py runs/ablate-regime/results.json --plot regime.png

The first needs nothing and takes seconds; the second draws what `mmrm ablate configs/ablate_regime.py` measured beside.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mmrm_jax.ablate.two_features import accuracy, fit, two_feature_world
from mmrm_jax.eval.report_plots import new_figure, to_png
from mmrm_jax.objectives import shortcut_aware, standard

AGREEMENT = (0.6, 0.7, 0.8, 0.9, 0.97)
AGAINST = (0.0, 0.05, 0.1, 0.2, 0.3)
EVIDENCE = (1.0, 2.0, 3.0)


@dataclasses.dataclass(frozen=True)
class RegimeMap:
    """Attributes:
    results: results.json of the measured grid; None draws the exact maps alone.
    plot: PNG file to draw to.
    json: File for the numbers.
    """

    results: Annotated[Path | None, tyro.conf.Positional] = None
    plot: Path | None = None
    json: Path | None = None


def exact(evidence: float) -> list[dict[str, float]]:
    """Changes by shortcut-aware training, fractions, with the cue reversed ("ood") and as trained ("iid").

    As many labels go against the image in both as in training: so it is in the tests of the shapes world.
    """
    places = [(agreement, against) for agreement in AGREEMENT for against in AGAINST]
    worlds = [two_feature_world(agreement, evidence, against) for agreement, against in places]
    fitted = [fit(objective, worlds) for objective in (standard(), shortcut_aware())]
    rows = []
    for (agreement, against), *pair in zip(places, *fitted, strict=True):
        own = [accuracy(weights, agreement, evidence, against) for weights in pair]
        reversed_cue = [accuracy(weights, 1 - agreement, evidence, against) for weights in pair]
        place = {"agreement": agreement, "noise": against, "evidence": evidence}
        rows.append(place | {"iid": own[1] - own[0], "ood": reversed_cue[1] - reversed_cue[0]})
    return rows


def measured(path: Path) -> list[dict[str, float]]:
    """The same of a grid over cue_agreement and label_noise."""
    rows = []
    for row in json.loads(path.read_text())["table"]:
        place = dict(re.findall(r"(\w+)=([\d.]+)", row["setting"]))
        if row["objective"] == "shortcut_aware" and {"cue_agreement", "label_noise"} <= set(place):
            where = {"agreement": float(place["cue_agreement"]), "noise": float(place["label_noise"])}
            rows.append(where | {"iid": row["iid_change"], "ood": row["ood_change"]})
    if not rows:
        raise SystemExit(f"{path} has no grid over shapes.cue_agreement and shapes.label_noise")
    return rows


def grid(rows: list[dict[str, float]], what: str) -> tuple[np.ndarray, list[float], list[float]]:
    """(values [noise, agreement] in points, agreements, noises)."""
    across, down = sorted({r["agreement"] for r in rows}), sorted({r["noise"] for r in rows})
    values = np.full((len(down), len(across)), np.nan)
    for row in rows:
        values[down.index(row["noise"]), across.index(row["agreement"])] = 100 * row[what]
    return values, across, down


def draw(maps: dict[str, list[dict[str, float]]]) -> bytes:
    """A row of maps for each of o.o.d. and i.i.d., on one scale."""
    figure = new_figure(3.1 * len(maps), 5.4)
    axes = figure.subplots(2, len(maps), squeeze=False)
    for column, (title, rows) in enumerate(maps.items()):
        for line, what in enumerate(("ood", "iid")):
            values, across, down = grid(rows, what)
            place = axes[line][column]
            place.imshow(values, cmap="RdBu", vmin=-100, vmax=100, aspect="auto", origin="lower")
            for (i, j), value in np.ndenumerate(values):
                colour = "white" if abs(value) > 60 else "black"
                place.text(j, i, f"{value:+.0f}", ha="center", va="center", fontsize=8, color=colour)
            place.set_xticks(range(len(across)), [f"{a:g}" for a in across], fontsize=8)
            place.set_yticks(range(len(down)), [f"{d:g}" for d in down], fontsize=8)
            place.set_title(f"{title}: {'o.o.d.' if what == 'ood' else 'i.i.d.'}", fontsize=9)
            place.set_xlabel("cue agreement", fontsize=8)
            place.set_ylabel("labels against the image", fontsize=8)
    return to_png(figure)


def main() -> None:
    """Print the tables; draw and write what is asked for."""
    args = tyro.cli(RegimeMap, description=__doc__)
    maps = {f"two features, evidence {evidence:g}": exact(evidence) for evidence in EVIDENCE}
    if args.results is not None:
        maps["shapes world, measured"] = measured(args.results)
    console = Console()
    for title, rows in maps.items():
        for what, name in (("ood", "o.o.d. accuracy"), ("iid", "i.i.d. accuracy")):
            values, across, down = grid(rows, what)
            table = Table(title=f"{title}: change of {name} in points", title_justify="left")
            table.add_column("labels against the image \\ cue agreement")
            for a in across:
                table.add_column(f"{a:g}", justify="right")
            for d, line in zip(down, values, strict=True):
                table.add_row(f"{d:g}", *(f"{value:+.1f}" for value in line))
            console.print(table)
    result: dict[str, Any] = {"maps": maps}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        args.plot.write_bytes(draw(maps))


if __name__ == "__main__":
    main()
