"""A training step on groups of four responses with all six comparisons, as VLFeedback has them.

    python benchmarks/train_groups.py --size big --json groups.json

As `train_pairs.py`, but here mmrm_jax runs four responses beside one image and prompt, where the usual loop makes six
pairs, twelve whole conversations, of the group. Torch accumulates gradients over micro-batches of as many pairs as
`train_pairs.py` has, and updates once.
"""

from __future__ import annotations

import itertools

import tyro
from train_pairs import PairOptions, run

if __name__ == "__main__":
    options = tyro.cli(PairOptions, description=__doc__)
    run(__file__, "Training step, groups of four", options, 4, list(itertools.combinations(range(4), 2)))
