"""Two training environments at once, tested on a third: what knowing which is which is worth.

    mmrm ablate configs/ablate_environments.py

Each point of the grid leaves one of the shapes world's environments out. `v_rex` and `group_dro:environments=2` are
told the environment of every comparison, `group_dro` is not.
"""

import dataclasses
from pathlib import Path

from mmrm_jax.config import AblateConfig, MatrixConfig, ShapesConfig
from mmrm_jax.eval.quickstart import CONFIG

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    grid=("shapes.left_out=long,hedged,short",),
    matrix=MatrixConfig(
        title="Two training environments at once, on the shapes world",
        out=Path("runs/ablate-environments"),
        objectives=(
            "text_only",
            "standard",
            "shortcut_aware",
            "v_rex",
            "v_rex:beta=10",
            "group_dro",
            "group_dro:environments=2",
        ),
        seeds=3,
        train=dataclasses.replace(CONFIG.train, steps=100),
    ),
)
