"""Rival objectives against standard training on the shapes world: three environments, three seeds, short runs.

    mmrm ablate configs/ablate_objectives.py

Each run sees 6,400 comparisons, 1.6 times each: enough to tell the objectives apart, and the whole table takes an hour
and a half on two cores. Options are the objectives' defaults, none was tuned. `docs/ablations.md` has what it found.
`listwise` is not here: of two responses it is standard training. `v_rex` wants several training environments:
configs/ablate_environments.py.
"""

import dataclasses
from pathlib import Path

from mmrm_jax.config import AblateConfig, MatrixConfig, ShapesConfig
from mmrm_jax.eval.quickstart import CONFIG

config = AblateConfig(
    shapes=ShapesConfig(comparisons=4096),
    matrix=MatrixConfig(
        title="Objectives on the shapes world",
        out=Path("runs/ablate-objectives"),
        objectives=(
            "text_only",
            "standard",
            "shortcut_aware",
            "lff",
            "product_of_experts",
            "learned_mixin",
            "rubi",
            "debiased_focal",
            "focal",
            "group_dro",
            "jtt",
            "text_filtered:folds=2",
            "confidence_reg",
            "dfr",
            "mmlora",
            "self_ablation",
            "dual_sfc",
            "modality_dropout",
            "image_contrast",
            "mcr",
            "arm",
            "odin",
            "inform",
            "cib",
            "caption_only",
        ),
        seeds=3,
        train=dataclasses.replace(CONFIG.train, steps=100),
    ),
)
