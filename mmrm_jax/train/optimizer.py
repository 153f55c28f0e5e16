"""AdamW with joint clipping, warm-up and cosine decay."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmrm_jax.config import DecoderFamily, OptimizerConfig
from mmrm_jax.types import PyTree

UNDECAYED = ("bias", "scale", "scale1", "scale2")
KNOWN_NORMS = ("llama", "qwen2", "qwen3")  # decoder families whose RMS norms the Hugging Face Trainer spares


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 (the first step has rate 0), then half a cosine to 0 at `steps`.

    A fraction of a step of warm-up is a whole one, as in the Hugging Face Trainer.
    """
    warmup = max(1, math.ceil(round(config.warmup_fraction * steps, 6)))
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1), 0.0)


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: everything but biases and the scales of norms, in both branches alike."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] not in UNDECAYED, params)


def reference_decay_mask(params: PyTree, family: DecoderFamily) -> PyTree:
    """The Hugging Face Trainer's choice for the paper's code: no decay for layer norms, for the RMS norms it knows
    (those of Llama and Qwen), and for every name that has "bias" in it, which takes in the proxy: `bias_reward_model`.
    """
    flat = {tuple(_names(path)) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}

    def decays(path: tuple, _: Any) -> bool:
        branch, *names = _names(path)
        if (branch == "proxy" and "primary" in params) or names[-1] == "bias":
            return False
        is_norm = names[-1] == "scale"
        is_layer_norm = is_norm and (branch, *names[:-1], "bias") in flat
        return not (is_layer_norm or (is_norm and names[0] == "decoder" and family in KNOWN_NORMS))

    return jax.tree_util.tree_map_with_path(decays, params)


def _names(path: tuple) -> list[str]:
    """The names along a key path; NNX variables end it with an attribute of their own, which is left out."""
    return [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]


def of_branch(params: PyTree, *, proxy: bool) -> PyTree:
    """True for the parameters of the proxy, or for all others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: (_names(path)[0] == "proxy") == proxy, params)


def make_optimizer(
    config: OptimizerConfig, steps: int, family: DecoderFamily = "qwen2"
) -> optax.GradientTransformation:
    """Clip by the global norm over all branches together, then AdamW. `family` matters to "reference" decay alone.

    Where the configuration says so, the proxy has a learning rate of its own, and the others wait while it learns.
    """
    reference = functools.partial(reference_decay_mask, family=family)
    later = []
    if config.proxy_rate != 1.0:
        later.append(optax.masked(optax.scale(config.proxy_rate), functools.partial(of_branch, proxy=True)))
    if config.head_start:
        waits = optax.scale_by_schedule(lambda step: jnp.where(jnp.asarray(step) < config.head_start, 0.0, 1.0))
        later.append(optax.masked(waits, functools.partial(of_branch, proxy=False)))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask if config.decay_groups == "uniform" else reference,
        ),
        *later,
    )
