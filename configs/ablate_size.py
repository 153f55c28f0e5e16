"""Do larger models need shortcut-aware training less? Three sizes of the tiny family, pretrained alike.

    for size in 32x1 64x2 96x3; do
        python -m mmrm_jax.tiny.recipe --out runs/sizes/$size --width ${size%x*} --layers ${size#*x} \
            --captions 20000 --steps 1000
    done
    mmrm ablate configs/ablate_size.py

A size is the width and the layers of tower and decoder. Each sees 5,000 steps of pretraining, a sixth of what the
packaged model saw, and 100 of training. `docs/ablations.md` has what was found.
"""

import dataclasses
from pathlib import Path

from mmrm_jax.config import AblateConfig, MatrixConfig, ShapesConfig
from mmrm_jax.eval.quickstart import CONFIG

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    grid=("matrix.model=runs/sizes/32x1,runs/sizes/64x2,runs/sizes/96x3",),
    matrix=MatrixConfig(
        title="Three sizes of model, on the shapes world",
        out=Path("runs/ablate-size"),
        objectives=("text_only", "standard", "shortcut_aware"),
        seeds=3,
        train=dataclasses.replace(CONFIG.train, steps=100),
    ),
)
