"""Ensembles in training: what the text-only proxy explains is left to it, and the primary alone is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmrm_jax.objectives.base import Objective, Seen, Terms, bradley_terry, surprise

BRANCHES = {"primary": "multimodal", "proxy": "proxy"}


def product_of_experts() -> Objective:
    """softplus(-(d + stop_gradient(b) - m)) + Lt: log-probabilities of both add up, so do margins.

    Clark, Yatskar and Zettlemoyer 2019, "Don't Take the Easy Way Out", arXiv 1909.03683 ("bias product"); its bias-only
    model is trained before, the proxy here beside.
    """

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in BRANCHES}
        together = seen.margin("primary") + jax.lax.stop_gradient(seen.margin("proxy"))
        return Terms(bradley_terry(together, seen.comparisons) + losses["proxy"], losses)

    return Objective("product_of_experts", BRANCHES, "primary", terms)


def learned_mixin(*, penalty: float = 0.03) -> Objective:
    """softplus(-(d + g * stop_gradient(b) - m)) + Lt + penalty * H(sigmoid(g * stop_gradient(b))).

    g = softplus(w . h) says how far the proxy is to be trusted; the entropy H, in nats, keeps it from being ignored. h
    is the mean of the two responses' pooled states, so that g is the same whichever of them is named first.

    Clark, Yatskar and Zettlemoyer 2019, arXiv 1909.03683 ("learned-mixin +H"), whose h is that of one example.
    """

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in BRANCHES}
        winner, loser = seen.pairs(seen.pooled["primary"])
        gate = jax.nn.softplus(((winner + loser) / 2 @ seen.heads["gate"])[:, 0])
        biased = gate * jax.lax.stop_gradient(seen.margin("proxy"))
        loss = bradley_terry(seen.margin("primary") + biased, seen.comparisons) + losses["proxy"]
        return Terms(loss + penalty * _entropy(biased), losses)

    return Objective("learned_mixin", BRANCHES, "primary", terms, pooled=("primary",), heads={"gate": 1})


def _entropy(logit: jax.Array) -> jax.Array:
    """Of a coin with this logit, in nats."""
    p = jax.nn.sigmoid(logit)
    return p * jax.nn.softplus(-logit) + (1 - p) * jax.nn.softplus(logit)


def rubi() -> Objective:
    """The Bradley-Terry loss of r * sigmoid(r_text) response by response, + Lt.

    What text finds likely anyway is let through, so that it teaches the primary less. As in the source the mask has a
    gradient: the proxy learns from both terms.

    Cadene et al. 2019, "RUBi: Reducing Unimodal Biases for Visual Question Answering", arXiv 1906.10169, where the mask
    is on a classifier's logits.
    """

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in BRANCHES}
        winner, loser = seen.pairs(seen.rewards["primary"] * jax.nn.sigmoid(seen.rewards["proxy"]))
        return Terms(bradley_terry(winner - loser, seen.comparisons) + losses["proxy"], losses)

    return Objective("rubi", BRANCHES, "primary", terms)


def lff(*, q: float = 0.7, weighted: bool = True, proxy: str = "text", running: float = 0.7) -> Objective:
    """W * L + GCE(p_b), W = stop_gradient(Mt / (Mt + M)) of running means M of L and Mt of Lt, GCE = (1 - p_b^q) / q.

    The generalised cross-entropy makes the proxy surer of what it already gets right. Where a comparison is
    seen once the weight is SFC's, without its epsilon; the difference to shortcut-aware training is then how the proxy
    learns. From its second visit on M is running * M + (1 - running) * L, and so for Mt.

    Nam et al. 2020, "Learning from Failure", arXiv 2007.02561. Their biased model sees the whole input:
    proxy=multimodal. Their code divides the means of each class by the largest, which has no meaning here, where the
    winner is the only class.

    Args:
      q: 0 trains the proxy with the ordinary loss.
      weighted: Weigh the primary's loss; without it, training is standard and the proxy stands beside.
      proxy: What the proxy sees, "text" or "multimodal".
      running: How much of the running means stays at each visit of a comparison, from 0, the step's losses alone, to 1.
    """
    if proxy not in ("text", "multimodal"):
        raise ValueError(f"lff:proxy is {proxy!r}; it must be text or multimodal")
    biased = "proxy" if proxy == "text" else "biased"

    def terms(seen: Seen) -> Terms:
        losses = {branch: seen.loss(branch) for branch in ("primary", biased)}
        primary, own = losses.values()
        means = _running_means(seen, jnp.stack([primary, own], axis=1), running)
        weight = means[:, 1] / (means.sum(axis=1) + jnp.finfo(jnp.float32).tiny)
        if q:
            # p^q as exp(q log p), whose gradient stays finite where p is 0.
            own = (1 - jnp.exp(-q * surprise(seen.margin(biased), seen.comparisons))) / q
        return Terms((weight * primary if weighted else primary) + own, losses, memory=means)

    branches = {"primary": "multimodal", biased: "proxy" if proxy == "text" else "multimodal"}
    return Objective("lff", branches, "primary", terms, remembers=2)


def _running_means(seen: Seen, losses: Float[Array, "C R"], keep: float) -> Float[Array, "C R"]:
    """Exponential means of every comparison's losses over its visits, without a gradient; the first is its loss."""
    losses = jax.lax.stop_gradient(losses)
    assert seen.memory is not None
    return jnp.where(seen.memory == 0, losses, keep * seen.memory + (1 - keep) * losses)
