"""Shortcut-aware training: comparisons weigh by how badly a text-only proxy fails on them.

Li et al., "The Devil Is in the Details: Tackling Unimodal Spurious Correlations for Generalizable Multimodal Reward
Models", ICML 2025, arXiv 2503.03122.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmrm_jax.objectives.base import Margins, Objective, Seen, Terms, bradley_terry
from mmrm_jax.types import Comparisons

EPSILON = 1e-7


def failure_share(
    primary_loss: Float[Array, " C"], proxy_loss: Float[Array, " C"], epsilon: float = EPSILON
) -> Float[Array, " C"]:
    """eps/2 + Lt_i / (eps + Lt_i + L_i), in (0, 1), with a gradient.

    1/2 when both branches do equally well, towards 1 where the text-only shortcut fails, towards 0 where it is enough.
    """
    return epsilon / 2 + proxy_loss / (epsilon + proxy_loss + primary_loss)


def shortcut_failure_coefficient(
    primary_loss: Float[Array, " C"], proxy_loss: Float[Array, " C"], epsilon: float = EPSILON
) -> Float[Array, " C"]:
    """SFC_i = stop_gradient(eps/2 + Lt_i / (eps + Lt_i + L_i)), in (0, 1)."""
    return jax.lax.stop_gradient(failure_share(primary_loss, proxy_loss, epsilon))


def shortcut_aware(
    *, epsilon: float = EPSILON, temperature: float = 1.0, stop_gradient: bool = True, normalise: bool = False
) -> Objective:
    """SFC_i * L_i + Lt_i: the primary learns from the first term alone, the proxy from the second.

    Args:
      epsilon: As in the formula.
      temperature: SFC from the losses to the power 1 / temperature: above 1 the weights are flatter, below 1 sharper.
      stop_gradient: The paper's. Without it either branch is drawn by the weights, too.
      normalise: Divide by the mean weight of the batch, so that the primary's loss is as large as in standard training.
    """

    def share(primary: Array, proxy: Array) -> Array:
        if temperature != 1.0:
            # Where a loss is 0, so is its power; the gradient of the power is infinite there.
            primary, proxy = (jnp.maximum(x, 1e-12) ** (1 / temperature) for x in (primary, proxy))
        weights = failure_share(primary, proxy, epsilon)
        return jax.lax.stop_gradient(weights) if stop_gradient else weights

    def weigh(margins: Margins, comparisons: Comparisons) -> Array:
        losses = (bradley_terry(margins[b], comparisons) for b in ("primary", "proxy"))
        return share(*losses)

    def terms(seen: Seen) -> Terms:
        primary, proxy = seen.loss("primary"), seen.loss("proxy")
        sfc = share(primary, proxy)
        if normalise:
            mean = jax.lax.stop_gradient(seen.mean(sfc))
            weight = sfc / jnp.where(mean > 0, mean, 1.0)  # 0 where no comparison is valid
        else:
            weight = sfc
        return Terms(weight * primary + proxy, {"primary": primary, "proxy": proxy}, sfc)

    return Objective(
        "shortcut_aware",
        {"primary": "multimodal", "proxy": "proxy"},
        "primary",
        terms,
        weigh=weigh,
        couples=normalise,
    )


def dual_sfc(*, combine: str = "least", epsilon: float = EPSILON) -> Objective:
    """min(SFC of a text-only proxy, SFC of an image-only one) * L_i + the proxies' own losses.

    The answer to what the paper leaves open: data that the image alone solves. A comparison weighs little where either
    shortcut is enough. This package's own; there is no source beside the paper's for one proxy.

    Args:
      combine: "least" of the two coefficients, or twice their "product", which is 1/2 where both are.
      epsilon: As in the formula.
    """
    if combine not in ("least", "product"):
        raise ValueError(f"combine is {combine!r}; it must be least or product")

    def combined(primary: Array, text: Array, image: Array) -> Array:
        by_text, by_image = (shortcut_failure_coefficient(primary, loss, epsilon) for loss in (text, image))
        return jnp.minimum(by_text, by_image) if combine == "least" else 2 * by_text * by_image

    def weigh(margins: Margins, comparisons: Comparisons) -> Array:
        losses = (bradley_terry(margins[b], comparisons) for b in ("primary", "proxy", "image"))
        return combined(*losses)

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in ("primary", "proxy", "image")}
        sfc = combined(*losses.values())
        return Terms(sfc * losses["primary"] + losses["proxy"] + losses["image"], losses, sfc)

    branches = {"primary": "multimodal", "proxy": "proxy", "image": "image_only"}
    return Objective("dual_sfc", branches, "primary", terms, weigh=weigh)
