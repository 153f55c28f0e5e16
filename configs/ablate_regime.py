"""When shortcut-aware training helps: cue agreement, label noise and image noise of the shapes world.

    mmrm ablate configs/ablate_regime.py
    python benchmarks/regime_map.py runs/ablate-regime/results.json --plot regime.png

The second command draws what was measured beside the two-feature model, in which it is exact.
"""

import dataclasses
from pathlib import Path

from mmrm_jax.config import AblateConfig, MatrixConfig, ShapesConfig
from mmrm_jax.eval.quickstart import CONFIG

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    grid=("shapes.cue_agreement=0.6,0.75,0.9", "shapes.label_noise=0.0,0.1,0.3"),
    matrix=MatrixConfig(
        title="When shortcut-aware training helps, on the shapes world",
        out=Path("runs/ablate-regime"),
        objectives=("text_only", "standard", "shortcut_aware"),
        seeds=3,
        train=dataclasses.replace(CONFIG.train, steps=100),
    ),
)
