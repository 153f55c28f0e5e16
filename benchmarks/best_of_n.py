"""Scoring many responses to one image and prompt, without gradients: best-of-64.

    python benchmarks/best_of_n.py --size big --json best.json

mmrm_jax encodes image and prompt once and runs the responses beside them; torch runs 64 conversations, each with the
image, a batch at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import tyro
from common import SIZES, Options, Side, compare, make_examples, measure_alone, saved_model, show, write


@dataclasses.dataclass(frozen=True)
class BestOptions(Options):
    """Attributes:
    responses: How many are scored.
    batch: Conversations that torch runs at a time.
    """

    responses: int = 64
    batch: int = 8


def make_side(name: str, folder: Path, *, options: BestOptions) -> Side:
    """Either implementation with the model and all responses loaded."""
    examples = make_examples(SIZES[options.size], options.responses, [], "absent", groups=1)
    if name == "torch":
        from torch_peer import Scoring

        return Scoring(folder, examples[0], options.batch)
    from ours import Scoring

    return Scoring(folder, examples)


def main() -> None:
    """The comparison as a table and as JSON."""
    options = tyro.cli(BestOptions, description=__doc__)
    made = functools.partial(make_side, options=options)
    if options.only:
        assert options.folder is not None, "--only needs --folder"
        write(options, measure_alone(lambda: made(options.only, options.folder), options))
        return
    extra = ("--responses", str(options.responses), "--batch", str(options.batch))
    with saved_model(options) as folder:
        sides = {name: functools.partial(made, name) for name in ("ours", "torch")}
        result = compare(__file__, sides, options, folder, *extra)
    show(f"Best of {options.responses}, {options.size}", {f"best of {options.responses}": result})
    write(options, {"results": {"best_of_n": result}})


if __name__ == "__main__":
    main()
