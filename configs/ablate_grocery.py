"""Objectives on real photos: the two grocery environments whose text cues oppose each other, three seeds, short runs.

    mmrm ablate configs/ablate_grocery.py --matrix.root ../shared/data/grocery

The settings are those of configs/grocery.py without its modifier, with fewer and larger batches and a tenth of the
photos held out: after about one pass over the data the cue still counts. `produce` is the o.o.d. test of `packages` and
the other way round; `neutral` is trained on by none.
"""

import dataclasses
import runpy
from pathlib import Path

from mmrm_jax.config import AblateConfig

grocery = runpy.run_path(str(Path(__file__).with_name("grocery.py")))["config"]

config = AblateConfig(
    matrix=dataclasses.replace(
        grocery,
        title="Objectives on grocery photos",
        out=Path("runs/ablate-grocery"),
        environments=tuple(
            dataclasses.replace(e, train=None if e.name == "neutral" else e.train) for e in grocery.environments
        ),
        objectives=(
            *("text_only", "standard", "shortcut_aware", "image_contrast", "product_of_experts"),
            *("group_dro", "dual_sfc", "jtt", "dfr"),
        ),
        seeds=3,
        modifiers=(),
        train=dataclasses.replace(
            grocery.train, batch_size=16, steps=240, data=dataclasses.replace(grocery.train.data, holdout=0.1)
        ),
    ),
)
