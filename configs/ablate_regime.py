"""When shortcut-aware training helps: cue agreement, label noise and image noise of the shapes world.

    mmrm ablate configs/ablate_regime.py
    python benchmarks/regime_map.py runs/ablate-regime/results.json --plot regime.png

The second command draws what was measured beside the two-feature model, in which it is exact.
"""

from pathlib import Path

from mmrm_jax.config import AblateConfig, DataConfig, MatrixConfig, OptimizerConfig, ShapesConfig, TrainConfig
from mmrm_jax.tiny import LEARNING_RATE

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    grid=("shapes.cue_agreement=0.6,0.75,0.9", "shapes.label_noise=0.0,0.1,0.3"),
    matrix=MatrixConfig(
        title="When shortcut-aware training helps, on the shapes world",
        out=Path("runs/ablate-regime"),
        objectives=("text_only", "standard", "shortcut_aware"),
        train=TrainConfig(
            batch_size=64,
            steps=100,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_fraction=0.05),
            data=DataConfig(holdout=0.0),
        ),
    ),
)
