"""Objectives: what a batch's forward passes gave in, per-comparison losses and diagnostics out."""

import inspect

from mmrm_jax.objectives import catalogue
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
from mmrm_jax.objectives.modifiers import centring, length_residual, margin
from mmrm_jax.objectives.shortcut import shortcut_aware, shortcut_failure_coefficient
from mmrm_jax.objectives.single import image_only, standard, text_only
from mmrm_jax.objectives.spec import parse_objective

OBJECTIVES = {name: make for name, make in vars(catalogue).items() if inspect.isfunction(make)}
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
