"""Raters who like long answers: swaps the sides of comparisons that a shorter answer has won.

    python benchmarks/length_bias.py DIR/train.jsonl --out biased.jsonl --share 0.3

Real labels carry such biases; labels made from the image alone do not, and there shortcut-aware training has nothing to
mend. This makes the one into the other, so that the same test files show what the bias does to each objective. Files
are pairwise JSONL; all rows, and everything else in them, stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class LengthBias:
    """Attributes:
    file: Pairwise JSONL.
    out: Where the biased file is written, with image paths as they were.
    share: Of the comparisons won by the shorter answer, how many are swapped.
    seed: Which ones.
    """

    file: Annotated[Path, tyro.conf.Positional]
    out: Path
    share: float = 0.3
    seed: int = 0


def main() -> None:
    """Write the biased file and say how many comparisons were swapped."""
    args = tyro.cli(LengthBias, description=__doc__)
    if not 0 <= args.share <= 1:
        raise SystemExit(f"--share is {args.share}; it must be from 0 to 1")
    rows = [json.loads(line) for line in args.file.read_text(encoding="utf-8").splitlines()]
    drawn = np.random.default_rng(args.seed).random(len(rows)) < args.share
    swapped = [bool(d) and len(r["chosen"]) < len(r["rejected"]) for d, r in zip(drawn, rows, strict=True)]
    with args.out.open("w", encoding="utf-8") as file:
        for row, swap in zip(rows, swapped, strict=True):
            sides = {"chosen": row["rejected"], "rejected": row["chosen"]} if swap else {}
            file.write(json.dumps(row | sides, ensure_ascii=False) + "\n")
    longer = np.mean([(len(r["chosen"]) > len(r["rejected"])) != s for r, s in zip(rows, swapped, strict=True)])
    print(f"{args.out}: {sum(swapped)} of {len(rows)} comparisons swapped; the longer answer wins {100 * longer:.1f} %")


if __name__ == "__main__":
    main()
