"""Do larger models need shortcut-aware training less? Three depths of the tiny family, pretrained by the same recipe.

    python -m mmrm_jax.tiny.recipe --out runs/sizes/64x1 --layers 1 --start mmrm_jax/tiny/model --steps 1000
    python -m mmrm_jax.tiny.recipe --out runs/sizes/64x4 --layers 4 --start mmrm_jax/tiny/model --steps 400
    mmrm ablate configs/ablate_size.py

A size is the width and the layers of the decoder. The packaged model, 64 wide and 2 deep, is the middle one; the others
start from it, without its last layer, or with two more that begin by changing nothing and want less training. Tower and
data are the same, as they are in InternVL's 2B, 4B and 8B.
"""

import dataclasses
from pathlib import Path

from mmrm_jax.config import AblateConfig, MatrixConfig, ShapesConfig
from mmrm_jax.eval.quickstart import CONFIG

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    grid=("matrix.model=runs/sizes/64x1,None,runs/sizes/64x4",),
    matrix=MatrixConfig(
        title="Three sizes of model, on the shapes world",
        out=Path("runs/ablate-size"),
        objectives=("text_only", "standard", "shortcut_aware"),
        seeds=3,
        train=dataclasses.replace(CONFIG.train, steps=100),
    ),
)
