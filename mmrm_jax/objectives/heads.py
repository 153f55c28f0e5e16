"""An objective with a second head beside the score, for length."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmrm_jax.objectives.base import Objective, Seen, Terms, bradley_terry

PRIMARY = {"primary": "multimodal"}


def odin(*, correlation: float = 1.0, orthogonality: float = 1.0) -> Objective:
    """L(d_score + d_length) + correlation * (|rho(r_score, length)| - rho(r_length, length)) + orthogonality * |w . v|.

    Two heads on one trunk add up to the reward that is trained; the second is to hold what goes with length, and is
    left behind. rho is Pearson's correlation with the number of tokens, over the responses of the batch; w and v are
    the heads.

    Chen et al. 2024, "ODIN: Disentangled Reward Mitigates Hacking in RLHF", arXiv 2402.07319.
    """

    def terms(seen: Seen) -> Terms:
        quality = seen.rewards["primary"]
        lengthy = (seen.pooled["primary"] @ seen.heads["length"])[..., 0]
        winner, loser = seen.pairs(quality + lengthy)
        ranking = bradley_terry(winner - loser, seen.comparisons)
        assert seen.lengths is not None
        rho = [_correlation(r, seen.lengths) for r in (quality, lengthy)]
        product = jnp.abs(jnp.sum(seen.heads["score"] * seen.heads["length"]))
        batch = correlation * (jnp.abs(rho[0]) - rho[1]) + orthogonality * product
        return Terms(ranking + batch, {"primary": seen.loss("primary")})

    return Objective("odin", PRIMARY, "primary", terms, pooled=("primary",), heads={"length": 1}, couples=True)


def _correlation(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
    """Pearson's, over the responses there are; 0 where either does not vary."""
    there = lengths > 0
    n = jnp.maximum(jnp.sum(there.astype(jnp.float32)), 1.0)

    def centred(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return jnp.where(there, x - jnp.sum(jnp.where(there, x, 0.0)) / n, 0.0)

    a, b = centred(rewards), centred(lengths)
    both = jnp.sum(a * a) * jnp.sum(b * b)
    varies = both > 1e-12
    return jnp.where(varies, jnp.sum(a * b) / jnp.sqrt(jnp.where(varies, both, 1.0)), 0.0)
