"""One branch, one Bradley-Terry loss: standard, text-only and image-only training."""

from __future__ import annotations

from mmrm_jax.objectives.base import Margins, Objective, Terms, bradley_terry
from mmrm_jax.types import Comparisons


def _terms(margins: Margins, comparisons: Comparisons) -> Terms:
    """L_i = softplus(-(d_i - m_i)) of the only branch there is."""
    ((branch, d),) = margins.items()
    loss = bradley_terry(d, comparisons)
    return Terms(loss, {branch: loss})


standard = Objective("standard", {"primary": "multimodal"}, "primary", _terms)
text_only = Objective("text_only", {"proxy": "proxy"}, "proxy", _terms)
image_only = Objective("image_only", {"image": "image_only"}, "image", _terms)
