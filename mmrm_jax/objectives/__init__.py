"""Objectives: margins in, per-comparison losses and diagnostics out."""

from mmrm_jax.objectives.base import Objective, Terms, bradley_terry, margins
from mmrm_jax.objectives.shortcut import shortcut_aware, shortcut_failure_coefficient
from mmrm_jax.objectives.single import image_only, standard, text_only

OBJECTIVES = {o.name: o for o in (standard, text_only, image_only, shortcut_aware)}

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Terms",
    "bradley_terry",
    "image_only",
    "margins",
    "shortcut_aware",
    "shortcut_failure_coefficient",
    "standard",
    "text_only",
]
