"""The worst group counts: comparisons that text gets right and those it gets wrong, weighed by how badly each goes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmrm_jax.objectives.base import Objective, Seen, Terms, label_probability


def group_dro(*, step: float = 0.01) -> Objective:
    """sum over groups g of q_g * mean L of g in the batch, + Lt; q_g grows as q_g * exp(step * mean L of g).

    Groups are the comparisons that the text-only proxy gets right and those that it gets wrong, as it stands. q adds up
    to 1, is carried from step to step, and has no gradient; a group that a batch lacks has loss 0 there.

    Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts", arXiv 1911.08731, whose groups are
    known beforehand.
    """

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in ("primary", "proxy")}
        right = label_probability(jax.lax.stop_gradient(seen.margin("proxy")), seen.comparisons) > 0.5
        mask = seen.comparisons.mask
        members = jnp.stack([right & mask, ~right & mask]).astype(jnp.float32)
        counts = jnp.maximum(jnp.sum(members, axis=1), 1.0)
        means = members @ losses["primary"] / counts
        assert seen.state is not None
        q = jax.nn.softmax(jnp.log(seen.state) + step * jax.lax.stop_gradient(means))
        # So that the mean over the batch's comparisons is sum_g q_g * mean_g.
        weight = (q * jnp.sum(members) / counts) @ members
        return Terms(weight * losses["primary"] + losses["proxy"], losses, state=q)

    return Objective(
        "group_dro",
        {"primary": "multimodal", "proxy": "proxy"},
        "primary",
        terms,
        state=(0.5, 0.5),
        couples=True,
    )
