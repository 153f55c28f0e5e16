"""The smallest world in which shortcut-aware training helps and hurts: a text cue, image evidence, two weights.

Each comparison carries a text cue that agrees with the label with probability p, and image evidence ~ N(mu, 1) for the
label, or N(-mu, 1) for the share q of labels that go against the image. The margin is linear in both; the proxy has the
cue alone. All integrals are exact up to quadrature, so what is found is the objective's own doing and no sampling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmrm_jax.objectives import Objective, Seen
from mmrm_jax.types import Comparisons


@dataclasses.dataclass(frozen=True)
class TwoFeatureWorld:
    """Comparisons as quadrature points [C]: cue (+1 agrees with the label), image evidence for it, probability."""

    cue: Float[np.ndarray, "C"]
    image: Float[np.ndarray, "C"]
    weight: Float[np.ndarray, "C"]


def two_feature_world(agreement: float, evidence: float, against_image: float) -> TwoFeatureWorld:
    """The world of p = `agreement`, mu = `evidence`, q = `against_image`; Gaussians by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(100)
    parts = [
        (p_cue * p_image / w.sum() * w, np.full_like(x, cue), sign * evidence + x)
        for p_cue, cue in ((agreement, 1.0), (1 - agreement, -1.0))
        for p_image, sign in ((1 - against_image, 1.0), (against_image, -1.0))
    ]
    weight, cue, image = (np.concatenate(p) for p in zip(*parts, strict=True))
    return TwoFeatureWorld(cue, image, weight)


def fit(objective: Objective, worlds: Sequence[TwoFeatureWorld], steps: int = 400) -> Float[np.ndarray, "W 2"]:
    """(cue weight, image weight) of the primary's margin in each world, after full-batch descent beside a proxy.

    Steps are preconditioned by the loss's curvature, so that they converge where weights are large. Objectives of a
    primary, or of a primary and a text-only proxy, without anything more. Raises RuntimeError where one does not
    converge.
    """
    n = len(worlds[0].weight)
    index = jnp.arange(2 * n, dtype=jnp.int32).reshape(n, 2)
    comparisons = Comparisons(index, jnp.zeros(n), jnp.zeros(n, bool), jnp.ones(n, bool))

    def descend(cue: Array, image: Array, weight: Array) -> tuple[Array, Array]:
        """The primary's weights, and the largest gradient that is left."""

        def loss(params: dict[str, Array]) -> Array:
            d = {"primary": params["primary"][0] * cue + params["primary"][1] * image, "proxy": params["proxy"] * cue}
            rewards = {b: jnp.stack([d[b], jnp.zeros_like(d[b])], axis=1) for b in objective.branches}
            return jnp.sum(weight * objective.terms(Seen(rewards, comparisons)).loss)

        def step(params: dict[str, Array], _: None) -> tuple[dict[str, Array], None]:
            grads = jax.grad(loss)(params)
            d = params["primary"][0] * cue + params["primary"][1] * image
            features = jnp.stack([cue, image])
            curvature = (features * (weight * jax.nn.sigmoid(d) * jax.nn.sigmoid(-d))[None]) @ features.T
            own = jnp.linalg.solve(curvature + 1e-6 * jnp.eye(2), grads["primary"])
            move = {"primary": own, "proxy": 4 * grads["proxy"]}
            return {k: params[k] - 0.5 * move[k] for k in params}, None

        start = {"primary": jnp.zeros(2), "proxy": jnp.zeros(())}
        params, _ = jax.lax.scan(step, start, length=steps)
        left = jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(jax.grad(loss)(params))])
        return params["primary"], jnp.max(left)

    stacked = (np.stack([getattr(w, name) for w in worlds]).astype(np.float32) for name in ("cue", "image", "weight"))
    weights, left = jax.jit(jax.vmap(descend))(*stacked)
    if not np.all(left < 1e-4):
        raise RuntimeError(
            f"{objective.name} did not converge in {steps} steps: a gradient of {left.max():.1e} is left"
        )
    return np.asarray(weights, np.float64)


def accuracy(weights: Float[np.ndarray, "2"], agreement: float, evidence: float, against_image: float) -> float:
    """P(margin > 0), a fraction: a Gaussian's tail in each of the four cases."""
    cue, image = weights
    spread = math.sqrt(2) * max(abs(image), 1e-30)
    return sum(
        p_cue * p_image * 0.5 * (1 + math.erf((c * cue + sign * image * evidence) / spread))
        for p_cue, c in ((agreement, 1.0), (1 - agreement, -1.0))
        for p_image, sign in ((1 - against_image, 1.0), (against_image, -1.0))
    )
