"""Objectives with a run before: what it finds about each comparison, or its parameters, are what they start from."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mmrm_jax.config import LoraConfig, TrainConfig
from mmrm_jax.objectives.base import Before, Objective, Seen, Terms, bradley_terry, label_probability
from mmrm_jax.objectives.shortcut import EPSILON, shortcut_failure_coefficient

PRIMARY = {"primary": "multimodal"}
# Standard training with a text-only proxy beside it that changes nothing: both margins of one run.
BESIDE = "lff:q=0,weighted=false"
TRUNK = ("vision", "projector", "decoder")


def jtt(*, weight: float = 5.0, share: float = 0.5, errors: str = "model") -> Objective:
    """weight * L for comparisons that the run before gets wrong, L for the others.

    Liu et al. 2021, "Just Train Twice", arXiv 2107.09044, where errors are repeated in the data as often.

    Args:
      weight: Of errors.
      share: How long the run before is, as a share of the steps: the source stops it early.
      errors: Whose: those of a standard "model", or of a "text"-only one.
    """
    if errors not in ("model", "text"):
        raise ValueError(f"jtt:errors is {errors!r}; it must be model or text")
    first, branch = ("standard", "primary") if errors == "model" else ("text_only", "proxy")

    def terms(seen: Seen) -> Terms:
        loss = seen.loss("primary")
        return Terms(jnp.where(_right(seen, branch), 1.0, weight) * loss, {"primary": loss})

    return Objective("jtt", PRIMARY, "primary", terms, before=Before(first, (branch,), share=share))


def text_filtered(*, keep: float = 0.0, folds: int = 5) -> Objective:
    """keep * L for comparisons that a text-only model gets right which has not seen their image, L for the others.

    The plain way that leaves nothing to weigh by; as in adversarial filtering (Le Bras et al. 2020, arXiv 2002.04108),
    once and with a text-only model.

    Args:
      keep: Weight of what text gets right; 0 leaves it out.
      folds: Parts of the data, by image: the margins of each come from a model trained on the others.
    """
    if folds < 2:
        raise ValueError(f"text_filtered:folds is {folds}; it must be at least 2")

    def terms(seen: Seen) -> Terms:
        loss = seen.loss("primary")
        return Terms(jnp.where(_right(seen, "proxy"), keep, 1.0) * loss, {"primary": loss})

    return Objective("text_filtered", PRIMARY, "primary", terms, before=Before("text_only", ("proxy",), folds=folds))


def confidence_reg() -> Objective:
    """Cross-entropy to a teacher's preference, flattened where text alone is sure: to sigmoid((1 - p_b) d_t).

    d_t is the margin of a standard model trained before, p_b what a text-only model trained beside it gives the label.
    Where text is sure the target is 1/2. A target margin plays no part here, and the label only in p_b.

    Utama, Moosavi and Gurevych 2020, "Mind the Trade-off: Debiasing NLU Models without Degrading the In-distribution
    Performance", arXiv 2005.00315, here for two classes: whose scaled probabilities p^(1 - p_b), normalised, these are.
    """

    def terms(seen: Seen) -> Terms:
        given, d = seen.comparisons.given, seen.margin("primary")
        sure = label_probability(given["proxy"], seen.comparisons)
        target = jax.nn.sigmoid((1 - sure) * given["primary"])
        loss = target * jax.nn.softplus(-d) + (1 - target) * jax.nn.softplus(d)
        return Terms(loss, {"primary": seen.loss("primary")})

    return Objective("confidence_reg", PRIMARY, "primary", terms, before=Before(BESIDE, ("primary", "proxy")))


def frozen_proxy(*, epsilon: float = EPSILON) -> Objective:
    """SFC_i * L_i as in shortcut-aware training, with the losses of a text-only model that was trained before.

    Its coefficients do not wait for a proxy to learn, and do not follow it: an ablation of training both together.

    Args:
      epsilon: As in `shortcut_failure_coefficient`.
    """

    def terms(seen: Seen) -> Terms:
        loss = seen.loss("primary")
        text = bradley_terry(seen.comparisons.given["proxy"], seen.comparisons)
        sfc = shortcut_failure_coefficient(loss, text, epsilon)
        return Terms(sfc * loss, {"primary": loss}, sfc)

    return Objective("frozen_proxy", PRIMARY, "primary", terms, before=Before("text_only", ("proxy",)))


def dfr() -> Objective:
    """The score head of a standard model trained further, on a balance of what text gets right and wrong.

    sum over the two of 1/2 * mean L of those in the batch. Text-only margins are those of a model trained beside the
    standard one.

    Kirichenko, Izmailov and Wilson 2023, "Last Layer Re-Training is Sufficient for Robustness to Spurious
    Correlations", arXiv 2204.02937, where the head is drawn anew, the balanced set is from held-out data, and groups
    are known.
    """

    def terms(seen: Seen) -> Terms:
        loss, right = seen.loss("primary"), _right(seen, "proxy")
        mask = seen.comparisons.mask
        members = jnp.stack([right & mask, ~right & mask]).astype(jnp.float32)
        counts = jnp.sum(members, axis=1)
        there = (counts > 0).astype(jnp.float32)
        weight = (there / jnp.sum(jnp.maximum(there, 1e-9)) * jnp.sum(counts) / jnp.maximum(counts, 1.0)) @ members
        return Terms(weight * loss, {"primary": loss})

    def adapt(config: TrainConfig) -> TrainConfig:
        return dataclasses.replace(config, freeze=TRUNK, lora=LoraConfig())

    before = Before(BESIDE, ("proxy",), start="primary")
    return Objective("dfr", PRIMARY, "primary", terms, before=before, adapt=adapt, couples=True)


def mmlora(*, rank: int = 8) -> Objective:
    """L of adapters on a text-only model that stays as it is: the image is learnt on top of what text says.

    Du et al. 2023, "Improving Discriminative Multi-Modal Learning with Large-Scale Pre-Trained Models", arXiv
    2310.05193 (MMLoRA), where every modality has a model of its own that is trained first.
    """
    if rank < 1:
        raise ValueError(f"mmlora:rank is {rank}; it must be at least 1")

    def terms(seen: Seen) -> Terms:
        loss = seen.loss("primary")
        return Terms(loss, {"primary": loss})

    def adapt(config: TrainConfig) -> TrainConfig:
        return dataclasses.replace(config, lora=LoraConfig(rank, targets=("projector", "decoder")))

    return Objective("mmlora", PRIMARY, "primary", terms, before=Before("text_only", start="proxy"), adapt=adapt)


def _right(seen: Seen, branch: str) -> jax.Array:
    """Whether the run before prefers the winner, or, of a tie, sees hardly a difference (`label_probability` > 1/2)."""
    return label_probability(seen.comparisons.given[branch], seen.comparisons) > 0.5
