"""Information bottlenecks: the state below the score is uncertain, and what it knows of its input costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmrm_jax.objectives.base import Forward, Objective, Seen, Terms, bradley_terry

PRIMARY = {"primary": "multimodal"}
Gaussian = tuple[Float[Array, "*of D"], Float[Array, "*of D"]]  # mean, logarithm of the variance


def inform(*, beta: float = 1e-4) -> Objective:
    """The Bradley-Terry loss of score . z, z ~ N(h, sigma^2), + beta * KL(N(h, sigma^2) || N(0, 1)), in nats.

    h is the pooled state, log sigma^2 = V h with a head V of its own; a comparison has the mean of its responses' KL.
    The deployed reward is score . h, the mean.

    Miao et al. 2024, "InfoRM: Mitigating Reward Hacking in RLHF via Information-Theoretic Reward Modeling", arXiv
    2402.09345, whose bottleneck is a network between h and the score: here it is at h itself.
    """

    def terms(seen: Seen) -> Terms:
        of_winner, of_loser = seen.pairs(_divergence(_state(seen, "primary")))
        loss = _uncertain(seen) + beta * (of_winner + of_loser) / 2
        return Terms(loss, {"primary": seen.loss("primary")})

    return Objective("inform", PRIMARY, "primary", terms, pooled=("primary",), heads={"variance": None})


def cib(*, beta: float = 5e-4) -> Objective:
    """The loss of `inform` without its KL + beta * (KL_text + KL_image - I(T; V) + SKL(T, V)), in nats, of the winner.

    T and V are the states N(h, sigma^2) of the response without the image, and with the image and without the prompt.
    Their divergences from N(0, 1) bound what they know of their inputs, SKL is the mean of their divergences from each
    other, and I a Jensen-Shannon estimate of their mutual information, -softplus(-f(i, i)) - mean_j softplus(f(i, j)),
    where j are the comparisons of other groups and f(i, j) = t_i W v_j is a score of their means, with a head W.

    Jiang et al. 2022, "Correlation Information Bottleneck: Towards Adapting Pretrained Multimodal Models for Robust
    Visual Question Answering", arXiv 2209.06954, whose T and V are a two-stream encoder's tokens of either modality,
    whose states have no noise (CLUB bounds what they know), and whose critic is a network. One decoder has no such
    streams: here they are what it makes of either input alone.
    """

    def terms(seen: Seen) -> Terms:
        text, image = _of_winners(seen, "text"), _of_winners(seen, "image")
        known = _divergence(text) + _divergence(image) + (_divergence(text, image) + _divergence(image, text)) / 2
        group = seen.group()
        others = seen.comparisons.mask[None] & (group[:, None] != group[None])
        shared = _shared(text[0] @ seen.heads["critic"] @ image[0].T, others)
        return Terms(_uncertain(seen) + beta * (known - shared), {"primary": seen.loss("primary")})

    return Objective(
        "cib",
        PRIMARY,
        "primary",
        terms,
        extra={"text": Forward("primary", "absent"), "image": Forward("primary", "image_only")},
        pooled=("primary", "text", "image"),
        heads={"variance": None, "critic": None},
        couples=True,
    )


def _state(seen: Seen, forward: str) -> Gaussian:
    h = seen.pooled[forward]
    return h, h @ seen.heads["variance"]


def _of_winners(seen: Seen, forward: str) -> Gaussian:
    mean, log_variance = _state(seen, forward)
    return seen.pairs(mean)[0], seen.pairs(log_variance)[0]


def _uncertain(seen: Seen) -> Float[Array, " C"]:
    """The Bradley-Terry loss of rewards of a drawn state."""
    h, log_variance = _state(seen, "primary")
    assert seen.keys is not None
    drawn = jax.vmap(lambda key: jax.random.normal(key, h.shape[1:]))(seen.keys)
    noise = jnp.exp(log_variance / 2) * drawn
    winner, loser = seen.pairs(seen.rewards["primary"] + (noise @ seen.heads["score"])[..., 0])
    return bradley_terry(winner - loser, seen.comparisons)


def _divergence(of: Gaussian, to: Gaussian | None = None) -> Float[Array, "*of"]:
    """KL divergence of a Gaussian with independent channels from another, in nats; None is N(0, 1)."""
    mean, log_variance = of
    if to is not None:
        mean, log_variance = (mean - to[0]) * jnp.exp(-to[1] / 2), log_variance - to[1]
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=-1)


def _shared(scores: Float[Array, "C C"], others: Bool[Array, "C C"]) -> Float[Array, " C"]:
    """The Jensen-Shannon estimate of mutual information, from a critic's scores of every pair."""
    apart = jnp.sum(jnp.where(others, jax.nn.softplus(scores), 0.0), axis=1)
    return -jax.nn.softplus(-jnp.diagonal(scores)) - apart / jnp.maximum(jnp.sum(others.astype(jnp.float32), axis=1), 1)
