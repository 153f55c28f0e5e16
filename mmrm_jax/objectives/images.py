"""Further forward passes of the primary on other images: what it says without its own has to differ."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mmrm_jax.objectives.base import Forward, Objective, Seen, Terms
from mmrm_jax.types import Batch, Prefix

PRIMARY = {"primary": "multimodal"}
WHITE = 255


def self_ablation(*, weight: float = 0.1, hinge: float = 0.0) -> Objective:
    """L + weight * d_blank^2, d_blank the primary's margin on a blank image in place of the photo.

    With `hinge` above 0 it is L + weight * max(0, hinge - (d - d_blank)): the image has to add that much. A tie has no
    hinge. This package's own.
    """

    def terms(seen: Seen) -> Terms:
        loss, blank = seen.loss("primary"), seen.margin("ablated")
        extra = blank**2
        if hinge:
            short = jax.nn.relu(hinge - (seen.margin("primary") - blank))
            extra = jnp.where(seen.comparisons.tie, 0.0, short)
        return Terms(loss + weight * extra, {"primary": loss})

    return Objective("self_ablation", PRIMARY, "primary", terms, extra={"ablated": Forward("primary", "blank")})


def modality_dropout(*, p: float = 0.2) -> Objective:
    """L, with the photo of a group replaced by white with probability p: text then has to answer for itself.

    As in multimodal networks that drop inputs whole (Neverova et al. 2016, "ModDrop", arXiv 1501.00102).
    """
    if not 0 <= p <= 1:
        raise ValueError(f"modality_dropout:p is {p}; it must be from 0 to 1")

    def change(prefix: Prefix, batch: Batch, keys: Key[Array, " G"]) -> Prefix:
        if prefix.pixels is None and prefix.features is None:  # a batch of groups without an image
            return prefix
        if prefix.pixels is None:
            raise ValueError("modality_dropout whitens pixels, and there are none: leave data.features out")
        drawn = jax.vmap(lambda key: jax.random.bernoulli(key, p))(keys)
        white = jnp.asarray(WHITE, prefix.pixels.dtype)
        return dataclasses.replace(prefix, pixels=jnp.where(drawn[:, None, None, None, None], white, prefix.pixels))

    def terms(seen: Seen) -> Terms:
        loss = seen.loss("primary")
        return Terms(loss, {"primary": loss})

    return Objective(
        "modality_dropout", PRIMARY, "primary", terms, extra={"primary": Forward("primary", change=change)}
    )


def image_contrast(*, negatives: int = 1, weight: float = 1.0) -> Objective:
    """L - weight * log softmax of r(image, prompt, chosen) over its own image and `negatives` others of the batch.

    The contrastive bound of Gupta et al. 2020, "Contrastive Learning for Weakly Supervised Phrase Grounding", arXiv
    2006.09920, on rewards. Equal images are no negatives; a tie, which has no chosen response, has no such term.
    """
    others = {f"other{k}": Forward("primary", change=_of_another(k)) for k in range(1, negatives + 1)}

    def terms(seen: Seen) -> Terms:
        loss, group = seen.loss("primary"), seen.group()
        own, _ = seen.pairs(seen.rewards["primary"])
        apart = [seen.pairs(seen.rewards[name])[0] - own for name in others]
        there = [seen.changed[name][group] for name in others]
        zero = jnp.zeros_like(own)
        contrast = jax.nn.logsumexp(jnp.stack([zero, *apart]), axis=0, where=jnp.stack([zero == 0, *there]))
        return Terms(loss + weight * jnp.where(seen.comparisons.tie, 0.0, contrast), {"primary": loss})

    return Objective("image_contrast", PRIMARY, "primary", terms, extra=others, couples=True)


def mcr(*, weight: float = 0.1) -> Objective:
    """L - weight * JS(sigmoid(d), sigmoid(d')), d' the margin with another image of the batch.

    The Jensen-Shannon divergence, in nats, of the two preferences; 0 where the other image is the same.

    Kontras et al. 2024, "Multimodal Fusion Balancing Through Game-Theoretic Regularization", arXiv 2411.07335, of whose
    terms this is the one between predictions with and without a permuted modality.
    """

    def terms(seen: Seen) -> Terms:
        loss = seen.loss("primary")
        apart = _jensen_shannon(seen.margin("primary"), seen.margin("permuted"))
        gained = jnp.where(seen.changed["permuted"][seen.group()], apart, 0.0)
        return Terms(loss - weight * gained, {"primary": loss})

    extra = {"permuted": Forward("primary", change=_of_another(1))}
    return Objective("mcr", PRIMARY, "primary", terms, extra=extra, couples=True)


def arm(*, weight: float = 1.0) -> Objective:
    """L + weight * gap * L_weak: comparisons are learnt again from the modality that contributes less to them.

    A modality contributes to the label, in nats, its Shapley value of ln 2 - L of a set of modalities, which is nothing
    for no modality: half of what it says alone, and half of what it adds to the other, its marginal and its conditional
    contribution. L_weak is the loss on the one with less, and gap by how much less, at most 1; neither has a gradient.
    Alone, text is the prompt beside a blank image, and the image has no prompt beside it.

    Gao et al. 2025, "Asymmetric Reinforcing against Multi-modal Representation Bias", arXiv 2501.01240, who estimate
    both contributions from histograms of a classifier's outputs, and draw an example again with its stronger modality
    dropped, the more often the larger the gap: here it weighs more, in the same step.
    """

    def terms(seen: Seen) -> Terms:
        both, text, image = (seen.loss(name) for name in ("primary", "ablated", "unprompted"))
        # (text - image): of both halves each has the difference of the losses alone.
        gap = jax.lax.stop_gradient(image - text)
        weak = jnp.where(gap > 0, image, text)
        return Terms(both + weight * jnp.minimum(jnp.abs(gap), 1.0) * weak, {"primary": both})

    extra = {"ablated": Forward("primary", "blank"), "unprompted": Forward("primary", "image_only")}
    return Objective("arm", PRIMARY, "primary", terms, extra=extra)


def _jensen_shannon(a: Array, b: Array) -> Array:
    """Of two coins with logits a and b, in nats."""
    first, second = ((jax.nn.sigmoid(x), jax.nn.sigmoid(-x)) for x in (a, b))
    middle = ((p + q) / 2 for p, q in zip(first, second, strict=True))
    return _entropy(*middle) - (_entropy(*first) + _entropy(*second)) / 2


def _entropy(p: Array, rest: Array) -> Array:
    """Of a coin, in nats; `rest` is 1 - p, given since that rounds to 0. Its gradient is finite where either is 0."""
    least = jnp.finfo(p.dtype).tiny
    return -(p * jnp.log(jnp.maximum(p, least)) + rest * jnp.log(jnp.maximum(rest, least)))


def _of_another(k: int):
    """A change that shows every group the image of the k-th one after it, counting round the groups there are.

    The places of visual tokens stay as they are: an image with fewer of them is read again from its beginning.
    """

    def change(prefix: Prefix, batch: Batch, keys: Key[Array, " G"]) -> Prefix:
        there = batch.group_index >= 0
        order = jnp.argsort(~there, stable=True)  # the groups there are come first
        rank = jnp.argsort(order)
        partner = jnp.where(there, order[(rank + k) % jnp.maximum(jnp.sum(there), 1)], jnp.arange(len(there)))
        tokens = jnp.max(prefix.visual_index, axis=1)[partner] + 1
        index = prefix.visual_index % jnp.maximum(tokens, 1)[:, None]
        pixels, features = (None if x is None else x[partner] for x in (prefix.pixels, prefix.features))
        visual = jnp.where(prefix.visual_index >= 0, index, -1)
        return dataclasses.replace(prefix, visual_index=visual, pixels=pixels, features=features)

    return change
