"""Objectives: what a batch's forward passes gave in, per-comparison losses and diagnostics out."""

from mmrm_jax.objectives.base import (
    Before,
    Forward,
    Objective,
    Seen,
    Terms,
    bradley_terry,
    label_probability,
    margins,
)
from mmrm_jax.objectives.bottleneck import cib, inform
from mmrm_jax.objectives.dro import group_dro, v_rex
from mmrm_jax.objectives.experts import learned_mixin, lff, product_of_experts, rubi
from mmrm_jax.objectives.focal import debiased_focal, focal
from mmrm_jax.objectives.heads import odin
from mmrm_jax.objectives.images import arm, image_contrast, mcr, modality_dropout, self_ablation
from mmrm_jax.objectives.listwise import listwise
from mmrm_jax.objectives.modifiers import centring, length_residual, margin
from mmrm_jax.objectives.shortcut import dual_sfc, shortcut_aware, shortcut_failure_coefficient
from mmrm_jax.objectives.single import caption_only, image_only, standard, text_only
from mmrm_jax.objectives.spec import parse_objective
from mmrm_jax.objectives.stages import confidence_reg, dfr, frozen_proxy, jtt, mmlora, text_filtered

# The line that an objective or a modifier adds itself to.
OBJECTIVES = {
    make.__name__: make
    for make in (
        *(standard, text_only, image_only, caption_only, shortcut_aware, dual_sfc),
        *(focal, debiased_focal, product_of_experts, learned_mixin, rubi, lff),
        *(listwise, self_ablation, modality_dropout, image_contrast, mcr, arm),
        *(odin, inform, cib, group_dro, v_rex),
        *(jtt, text_filtered, confidence_reg, frozen_proxy, dfr, mmlora),
    )
}
MODIFIERS = {make.__name__: make for make in (margin, centring, length_residual)}


def find_objective(spec: str) -> Objective:
    """The objective NAME, NAME:OPTION=VALUE,... or either with +MODIFIER:OPTION=VALUE,... behind it.

    Raises ValueError, saying what there is, for an unknown name or option and a value that does not fit.
    """
    return parse_objective(spec, OBJECTIVES, MODIFIERS)


__all__ = [
    "MODIFIERS",
    "OBJECTIVES",
    "Before",
    "Forward",
    "Objective",
    "Seen",
    "Terms",
    "bradley_terry",
    "find_objective",
    "image_only",
    "label_probability",
    "margins",
    "shortcut_aware",
    "shortcut_failure_coefficient",
    "standard",
    "text_only",
]
