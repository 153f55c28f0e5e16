"""Do larger models need shortcut-aware training less? Three sizes of the tiny family, pretrained by the same recipe.

    python -m mmrm_jax.tiny.recipe --out runs/sizes/32x1 --width 32 --layers 1
    python -m mmrm_jax.tiny.recipe --out runs/sizes/32x2 --width 32 --layers 2
    mmrm ablate configs/ablate_size.py

A size is the width and the layers of tower and decoder; the third is the packaged model, 64 wide and 2 deep.
Pretraining takes about an hour each: after 5,000 steps in place of 30,000 the smallest is right about 69 % of
held-out questions and at chance in checks of an answer, and no objective finds in a model what it has not learnt to
see.
"""

import dataclasses
from pathlib import Path

from mmrm_jax.config import AblateConfig, MatrixConfig, ShapesConfig
from mmrm_jax.eval.quickstart import CONFIG

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    grid=("matrix.model=runs/sizes/32x1,runs/sizes/32x2,None",),
    matrix=MatrixConfig(
        title="Three sizes of model, on the shapes world",
        out=Path("runs/ablate-size"),
        objectives=("text_only", "standard", "shortcut_aware"),
        seeds=3,
        train=dataclasses.replace(CONFIG.train, steps=100),
    ),
)
