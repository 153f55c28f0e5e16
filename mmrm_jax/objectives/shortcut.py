"""Shortcut-aware training: comparisons weigh by how badly a text-only proxy fails on them.

Li et al., "The Devil Is in the Details: Tackling Unimodal Spurious Correlations for Generalizable Multimodal Reward
Models", ICML 2025, arXiv 2503.03122.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from mmrm_jax.objectives.base import Margins, Objective, Terms, bradley_terry
from mmrm_jax.types import Comparisons

EPSILON = 1e-7


def shortcut_failure_coefficient(
    primary_loss: Float[Array, " C"], proxy_loss: Float[Array, " C"], epsilon: float = EPSILON
) -> Float[Array, " C"]:
    """SFC_i = stop_gradient(eps/2 + Lt_i / (eps + Lt_i + L_i)), in (0, 1).

    1/2 when both branches do equally well, towards 1 where the text-only shortcut fails, towards 0 where it is enough.
    """
    return jax.lax.stop_gradient(epsilon / 2 + proxy_loss / (epsilon + proxy_loss + primary_loss))


def _terms(margins: Margins, comparisons: Comparisons) -> Terms:
    """SFC_i * L_i + Lt_i: the primary learns from the first term alone, the proxy from the second."""
    primary = bradley_terry(margins["primary"], comparisons)
    proxy = bradley_terry(margins["proxy"], comparisons)
    sfc = shortcut_failure_coefficient(primary, proxy)
    return Terms(sfc * primary + proxy, {"primary": primary, "proxy": proxy}, sfc)


shortcut_aware = Objective("shortcut_aware", {"primary": "multimodal", "proxy": "proxy"}, "primary", _terms)
