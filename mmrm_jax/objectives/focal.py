"""Comparisons weigh by how hard they are: for the model itself, or for a text-only proxy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmrm_jax.objectives.base import Objective, Seen, Terms, label_probability, surprise

LEAST = 1e-12  # of 1 - p, below which a power of it is taken as flat: that of an exponent below 1 is steep at 0


def focal(*, gamma: float = 2.0) -> Objective:
    """(1 - p)^gamma * L with p = sigmoid(d); without a proxy, the weight has a gradient.

    Lin et al. 2017, "Focal Loss for Dense Object Detection", arXiv 1708.02002, here for which of two responses wins.
    """

    def terms(seen: Seen) -> Terms:
        loss = seen.loss("primary")
        rest = -jnp.expm1(-surprise(seen.margin("primary"), seen.comparisons))  # 1 - p, which rounds to 0
        return Terms(jnp.maximum(rest, LEAST) ** gamma * loss, {"primary": loss})

    return Objective("focal", {"primary": "multimodal"}, "primary", terms)


def debiased_focal(*, gamma: float = 2.0) -> Objective:
    """stop_gradient(1 - p_b)^gamma * L + Lt, p_b what the proxy gives the label.

    Karimi Mahabadi, Belinkov and Henderson 2020, "End-to-End Bias Mitigation by Modelling Biases in Corpora", arXiv
    1909.06321, whose bias-only model is the text-only proxy here.
    """

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in ("primary", "proxy")}
        p = label_probability(seen.margin("proxy"), seen.comparisons)
        weight = jax.lax.stop_gradient((1 - p) ** gamma)
        return Terms(weight * losses["primary"] + losses["proxy"], losses)

    return Objective("debiased_focal", {"primary": "multimodal", "proxy": "proxy"}, "primary", terms)
