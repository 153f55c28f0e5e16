"""Groups and environments count as such: the worst of them most, or all of them alike."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmrm_jax.objectives.base import Objective, Seen, Terms, label_probability

BRANCHES = {"primary": "multimodal", "proxy": "proxy"}


def group_dro(*, step: float = 0.01, environments: int = 1) -> Objective:
    """sum over groups g of q_g * mean L of g in the batch, + Lt; q_g grows as q_g * exp(step * mean L of g).

    Groups are the comparisons that the text-only proxy gets right and those that it gets wrong, as it stands. q adds up
    to 1, is carried from step to step, and has no gradient; a group that a batch lacks has loss 0 there.

    Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts", arXiv 1911.08731, whose groups are
    known beforehand.

    Args:
      step: How fast q follows the losses.
      environments: How many there are in the training data; above 1 the groups of each are groups of their own.
    """
    if environments < 1:
        raise ValueError(f"group_dro:environments is {environments}; it must be at least 1")

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in BRANCHES}
        right = label_probability(jax.lax.stop_gradient(seen.margin("proxy")), seen.comparisons) > 0.5
        place = seen.environment() if environments > 1 else jnp.zeros_like(right, jnp.int32)
        members = _members(2 * place + (~right).astype(jnp.int32), 2 * environments, seen.comparisons.mask)
        counts = jnp.maximum(jnp.sum(members, axis=1), 1.0)
        means = members @ losses["primary"] / counts
        assert seen.state is not None
        q = jax.nn.softmax(jnp.log(seen.state) + step * jax.lax.stop_gradient(means))
        # So that the mean over the batch's comparisons is sum_g q_g * mean_g.
        weight = (q * jnp.sum(members) / counts) @ members
        return Terms(weight * losses["primary"] + losses["proxy"], losses, state=q)

    groups = 2 * environments
    return Objective(
        "group_dro",
        BRANCHES,
        "primary",
        terms,
        state=(1 / groups,) * groups,
        environments=environments if environments > 1 else 0,
        couples=True,
    )


def v_rex(*, beta: float = 1.0) -> Objective:
    """mean over environments e of L_e + beta * variance over environments of L_e, L_e the mean L of e in the batch.

    An environment that a batch lacks plays no part in it; of a single one this is standard training. The variance is
    that of the population.

    Krueger et al. 2021, "Out-of-Distribution Generalization via Risk Extrapolation (REx)", arXiv 2003.00688, eq. 8,
    where losses are summed.

    Args:
      beta: Weight of the variance.
    """

    def terms(seen: Seen) -> Terms:
        loss, mask = seen.loss("primary"), seen.comparisons.mask
        # Each is named by the first comparison of it: there can be as many as comparisons, whatever their numbers.
        place = jnp.where(mask, seen.environment(), -1)
        members = _members(jnp.argmax(place[:, None] == place[None], axis=1), len(loss), mask)
        counts = jnp.sum(members, axis=1)
        there = (counts > 0).astype(loss.dtype)
        count = jnp.maximum(jnp.sum(there), 1.0)
        risks = members @ loss / jnp.maximum(counts, 1.0)
        mean = jnp.sum(there * risks) / count
        variance = jnp.sum(there * (risks - mean) ** 2) / count
        # So that the mean over the batch's comparisons is that of the environments; the variance is all of theirs.
        share = (jnp.sum(counts) / count / jnp.maximum(counts, 1.0)) @ members
        return Terms(share * loss + beta * variance, {"primary": loss})

    return Objective("v_rex", {"primary": "multimodal"}, "primary", terms, environments=sys.maxsize, couples=True)


def _members(group: Array, groups: int, mask: Bool[Array, " C"]) -> Float[Array, "groups C"]:
    """1 where a valid comparison is of a group."""
    return ((group[None] == jnp.arange(groups)[:, None]) & mask[None]).astype(jnp.float32)
