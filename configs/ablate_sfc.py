"""Shortcut-aware training taken apart: what of it does the work? The shapes world, three seeds, short runs.

    mmrm ablate configs/ablate_sfc.py

Its weights with a gradient, normalised, flatter, sharper, with a large epsilon, from a text-only model that was trained
before, and beside a product with image-only coefficients. Two more axes are for the command line: the proxy's input,
`--grid matrix.train.proxy_input=absent,blank`, its learning rate and head start, `--grid
matrix.train.optimizer.proxy_rate=0.3,1,3` and `--grid matrix.train.optimizer.head_start=0,20`, and a trunk that both
branches share, `--grid matrix.train.lora.rank=0,8`.
"""

import dataclasses
from pathlib import Path

from mmrm_jax.config import AblateConfig, MatrixConfig, ShapesConfig
from mmrm_jax.eval.quickstart import CONFIG

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    matrix=MatrixConfig(
        title="Shortcut-aware training taken apart",
        out=Path("runs/ablate-sfc"),
        objectives=(
            "text_only",
            "standard",
            "shortcut_aware",
            "shortcut_aware:stop_gradient=false",
            "shortcut_aware:normalise=true",
            "shortcut_aware:temperature=2",
            "shortcut_aware:temperature=0.5",
            "shortcut_aware:epsilon=0.5",
            "frozen_proxy",
            "lff:q=0",
            "dual_sfc",
        ),
        seeds=3,
        train=dataclasses.replace(CONFIG.train, steps=100),
    ),
)
