"""A training step on pairs: how much faster, and in how much less memory, than transformers and torch do the same?

    python benchmarks/train_pairs.py --size big --json pairs.json

One step is forward, backward and AdamW of the shortcut-aware objective in float32, with the vision tower frozen, for a
batch of pairs: one image and prompt with a chosen and a rejected response each. Torch runs each conversation whole, in
four forwards: chosen and rejected, for the model and for the text-only proxy. `blank` shows the proxy one white tile
with every conversation, `absent` no image. Before anything is timed, rewards, loss and gradient norm are compared.
The last row puts `absent` here beside `blank` there, which is how the paper's code trains: two trainings that were each
checked in the rows above.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from common import (
    SIZES,
    Options,
    Side,
    compare,
    interleaved,
    make_examples,
    measure_alone,
    saved_model,
    show,
    summary,
    write,
)

PROXIES = ("blank", "absent")


@dataclasses.dataclass(frozen=True)
class PairOptions(Options):
    """Attributes:
    proxy: What the proxy sees; both in turn where it is not given.
    """

    proxy: Literal["blank", "absent"] | None = None


def make_side(
    name: str, folder: Path, *, size: str, proxy: str, responses: int, comparisons: Sequence[tuple[int, int]]
) -> Side:
    """Either implementation, loaded; torch takes as many comparisons at a time as there are groups."""
    examples = make_examples(SIZES[size], responses, comparisons, proxy)
    if name == "torch":
        from torch_peer import Training

        return Training(folder, examples, proxy, batch=len(examples))
    from ours import Training

    from mmrm_jax.config import TrainConfig

    return Training(folder, examples, TrainConfig(proxy_input=proxy, batch_size=len(examples)))  # type: ignore[arg-type]


def run(script: str, title: str, options: PairOptions, responses: int, comparisons: Sequence[tuple[int, int]]) -> None:
    """The comparison for each proxy, as a table and as JSON."""
    made = functools.partial(make_side, size=options.size, responses=responses, comparisons=comparisons)
    if options.only:
        assert options.folder is not None and options.proxy is not None, "--only needs --folder and --proxy"
        write(options, measure_alone(lambda: made(options.only, options.folder, proxy=options.proxy), options))
        return
    results = {}
    with saved_model(options) as folder:
        for proxy in (options.proxy,) if options.proxy else PROXIES:
            sides = {name: functools.partial(made, name, proxy=proxy) for name in ("ours", "torch")}
            results[proxy] = compare(script, sides, options, folder, "--proxy", proxy)
        if not options.proxy:
            results["absent, torch blank"] = _as_in_the_paper(results, made, folder, options.repeats)
    show(f"{title}, {options.size}", results)
    write(options, {"results": results})


def _as_in_the_paper(
    results: Mapping[str, Any], made: Callable[..., Side], folder: Path, repeats: int
) -> dict[str, Any]:
    """What leaving out the proxy's image gains over showing it a blank one in torch."""
    given = {"ours": "absent", "torch": "blank"}
    steps = {name: made(name, folder, proxy=proxy).step for name, proxy in given.items()}
    for step in steps.values():
        step()
    alone = {n: results[p]["alone"][n] | {"peak_mib": results[p]["peak_mib"][n]} for n, p in given.items()}
    return summary(interleaved(steps, repeats), alone)


if __name__ == "__main__":
    run(__file__, "Training step, pairs", tyro.cli(PairOptions, description=__doc__), 2, [(0, 1)])
