"""How far a training step on pairs is from what this machine can do at all, by its matrix products alone.

    python benchmarks/bound.py --size big

The products that a step has to compute are counted from the model's sizes: with image and prompt once a group, as they
are computed here, and once a response, as a loop over chosen and rejected conversations computes them. The rate is that
of the machine on one large float32 product, the best of many. Products over rate is the least that a step can take, and
apart over shared the most that sharing can gain where both run at one rate.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from common import CONSOLE, SIZES, Example, Options, make_examples, write
from rich.table import Table


def apart(examples: Sequence[Example]) -> list[Example]:
    """Every response as a group of its own, with image and prompt."""
    return [dataclasses.replace(e, responses=(r,), comparisons=()) for e in examples for r in e.responses]


def measure(options: Options, proxy: str, folder: Path) -> dict[str, float]:
    """Counts, the rate, and the median time of a step; the two are measured in turn."""
    from ours import Training, collated

    from mmrm_jax.config import TrainConfig
    from mmrm_jax.eval.profile import batch_flops, peak_flops
    from mmrm_jax.models.hf.config import read_config

    config, examples = read_config(folder), make_examples(SIZES[options.size], 2, [(0, 1)], proxy)
    train = TrainConfig(proxy_input=proxy, batch_size=len(examples))  # type: ignore[arg-type]
    side = Training(folder, examples, train)

    def flops(groups: Sequence[Example]) -> float:
        batch = collated(groups, side.program.views, config)
        return batch_flops(batch, side.program, config, dataclasses.replace(train, batch_size=len(groups)))

    shared, separate = flops(examples), sum(flops([e]) for e in apart(examples))
    side.step()
    rates, seconds = [], []
    for _ in range(options.repeats):
        rates.append(peak_flops("float32")[0])
        start = time.perf_counter()
        side.step()
        seconds.append(time.perf_counter() - start)
    rate, step = max(rates), sorted(seconds)[len(seconds) // 2]
    return {
        "shared_flops": shared,
        "apart_flops": separate,
        "flops_per_second": rate,
        "least_s": shared / rate,
        "step_s": step,
        "share": shared / rate / step,
        "most_gain": separate / shared,
    }


def main() -> None:
    """Print the table, and write what it says."""
    options, results = tyro.cli(Options, description=__doc__), {}
    columns = ("proxy", "GFLOP", "GFLOP/s", "products alone, s", "step, s", "share", "GFLOP apart", "apart / shared")
    table = Table(*columns, title=f"A step's matrix products, {options.size}")
    with tempfile.TemporaryDirectory() as made:
        from ours import save_model

        save_model(SIZES[options.size], Path(made))
        for proxy in ("blank", "absent"):
            r = results[proxy] = measure(options, proxy, options.folder or Path(made))
            table.add_row(
                proxy,
                f"{r['shared_flops'] / 1e9:.3g}",
                f"{r['flops_per_second'] / 1e9:.3g}",
                f"{r['least_s']:.3g}",
                f"{r['step_s']:.3g}",
                f"{r['share']:.0%}",
                f"{r['apart_flops'] / 1e9:.3g}",
                f"{r['most_gain']:.2f}x",
            )
    CONSOLE.print(table)
    write(options, {"results": results})


if __name__ == "__main__":
    main()
