"""A small policy trained against a reward by its exact policy gradient: how far it gets, and what that is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Path:
    """A policy on its way, [T]: its KL divergence from the first in nats, and the mean of each value under it."""

    kl: Float[np.ndarray, " T"]
    values: dict[str, Float[np.ndarray, " T"]]


def policy_path(
    features: Float[np.ndarray, "P N F"],
    reward: Float[np.ndarray, "P N"],
    values: Mapping[str, Float[np.ndarray, "P N"]],
    *,
    steps: int = 200,
    rate: float = 0.1,
) -> Path:
    """Gradient ascent on the mean reward of pi(y | x) = softmax over the N responses of w . features, from w = 0.

    The policy knows a response by its features alone, the same w for all P prompts. The expectation over responses is
    taken in full (Sutton et al. 2000, "Policy Gradient Methods"): nothing is sampled, and nothing but the reward moves
    it. Rewards are divided by their standard deviation over all responses first, so that `rate` means the same for
    every model.
    """
    scale = float(np.std(reward)) or 1.0
    target = jnp.asarray(reward / scale, jnp.float32)
    known = jnp.asarray(features, jnp.float32)
    judged = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

    def log_policy(w: Array) -> Array:
        return jax.nn.log_softmax(known @ w, axis=1)

    def mean(w: Array, value: Array) -> Array:
        return jnp.mean(jnp.sum(jnp.exp(log_policy(w)) * value, axis=1))

    def step(w: Array, _: None) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        log_pi = log_policy(w)
        kl = jnp.mean(jnp.sum(jnp.exp(log_pi) * (log_pi + jnp.log(float(known.shape[1]))), axis=1))
        seen = {name: mean(w, value) for name, value in judged.items()}
        return w + rate * jax.grad(mean)(w, target), (kl, seen)

    _, (kl, seen) = jax.lax.scan(step, jnp.zeros(known.shape[2]), length=steps + 1)
    return Path(np.asarray(kl), {name: np.asarray(value) for name, value in seen.items()})
