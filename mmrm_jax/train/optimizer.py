"""AdamW with joint clipping, warm-up and cosine decay."""

from __future__ import annotations

import jax
import optax

from mmrm_jax.config import OptimizerConfig
from mmrm_jax.types import PyTree

UNDECAYED = ("bias", "scale", "scale1", "scale2")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 (the first step has rate 0), then half a cosine to 0 at `steps`."""
    warmup = max(1, round(config.warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1), 0.0)


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: everything but biases and the scales of norms, in both branches alike."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] not in UNDECAYED, params)


def _names(path: tuple) -> list[str]:
    """The names along a key path; NNX variables end it with an attribute of their own, which is left out."""
    return [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm over all branches together, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
