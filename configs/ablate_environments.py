"""Two training environments at once, tested on a third: what knowing which is which is worth.

    mmrm ablate configs/ablate_environments.py

Each point of the grid leaves one of the shapes world's environments out. `v_rex` and `group_dro:environments=2` are
told the environment of every comparison, `group_dro` is not.
"""

from pathlib import Path

from mmrm_jax.config import AblateConfig, DataConfig, MatrixConfig, OptimizerConfig, ShapesConfig, TrainConfig
from mmrm_jax.tiny import LEARNING_RATE

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
        train=TrainConfig(
            batch_size=64,
            steps=100,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_fraction=0.05),
            data=DataConfig(holdout=0.0),
        ),
    ),
)
