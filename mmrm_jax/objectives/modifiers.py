"""What any objective can be given besides: a target margin, rewards around 0, rewards without their slope on length."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmrm_jax.objectives.base import Margins, Objective, Seen, Terms
from mmrm_jax.types import Comparisons


def margin(objective: Objective, *, m: float = 1.0) -> Objective:
    """Target margins grow by m: softplus(-(d - m)), in every branch. Ties have none.

    Touvron et al. 2023, "Llama 2", arXiv 2307.09288, section 3.2.2, where m depends on how clear the preference was.
    """

    def asked(comparisons: Comparisons) -> Comparisons:
        return dataclasses.replace(comparisons, margin=comparisons.margin + m)

    def terms(seen: Seen) -> Terms:
        return objective.terms(dataclasses.replace(seen, comparisons=asked(seen.comparisons)))

    def weigh(margins: Margins, comparisons: Comparisons) -> Array:
        assert objective.weigh is not None
        return objective.weigh(margins, asked(comparisons))

    return dataclasses.replace(objective, terms=terms, weigh=weigh if objective.weigh else None)


def centring(objective: Objective, *, weight: float = 0.01) -> Objective:
    """+ weight * mean of r^2 over a comparison's two responses, of the branch that scores.

    Only differences of rewards are trained otherwise. Eisenstein et al. 2023, "Helping or Herding?", arXiv 2312.09244,
    take the square of the sum of the two.
    """

    def terms(seen: Seen) -> Terms:
        found = objective.terms(seen)
        winner, loser = seen.pairs(seen.rewards[objective.scores])
        return dataclasses.replace(found, loss=found.loss + weight * (winner**2 + loser**2) / 2)

    return dataclasses.replace(objective, terms=terms)


def length_residual(objective: Objective) -> Objective:
    """In training, rewards of the branch that scores lose what a least-squares line on length gives in their batch.

    So do the other forward passes of that branch, of the line that its own gives. The slope has no gradient; tokens are
    counted. What length explains is then no reason to change the model,
    which keeps whatever slope it has. After Huang et al. 2024, "Post-hoc Reward Calibration: A Case Study on Length
    Bias", arXiv 2409.17407, who correct finished rewards, and not by a straight line.
    """

    corrected = {name for name, forward in objective.forwards().items() if forward.branch == objective.scores}

    def terms(seen: Seen) -> Terms:
        assert seen.lengths is not None
        scored, there = seen.rewards[objective.scores], seen.lengths > 0
        lengths = seen.lengths.astype(jnp.float32)
        x = jnp.where(there, lengths - jnp.sum(lengths) / jnp.maximum(jnp.sum(there.astype(jnp.float32)), 1.0), 0.0)
        slope = jnp.sum(x * jnp.where(there, scored, 0.0)) / jnp.maximum(jnp.sum(x * x), 1.0)
        by_length = jax.lax.stop_gradient(slope) * x
        rewards = {name: r - by_length if name in corrected else r for name, r in seen.rewards.items()}
        return objective.terms(dataclasses.replace(seen, rewards=rewards))

    return dataclasses.replace(objective, terms=terms, couples=True)
