"""One branch, one Bradley-Terry loss: standard, text-only and image-only training."""

from __future__ import annotations

from mmrm_jax.objectives.base import Objective, Seen, Terms


def _terms(seen: Seen) -> Terms:
    """L_i = softplus(-(d_i - m_i)) of the only branch there is."""
    (branch,) = seen.rewards
    loss = seen.loss(branch)
    return Terms(loss, {branch: loss})


def standard() -> Objective:
    """The reward model with the image, and nothing else."""
    return Objective("standard", {"primary": "multimodal"}, "primary", _terms)


def text_only() -> Objective:
    """The reward model without the image: what text alone gives away."""
    return Objective("text_only", {"proxy": "proxy"}, "proxy", _terms)


def caption_only() -> Objective:
    """The reward model with a caption in place of the image: does it take pixels, or only what they show?

    After the question of Wang et al. 2024, arXiv 2405.01591; rows without a caption cannot be used.
    """
    return Objective("caption_only", {"caption": "caption"}, "caption", _terms)


def image_only() -> Objective:
    """The reward model with the image and without the prompt."""
    return Objective("image_only", {"image": "image_only"}, "image", _terms)
