"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): y = x W + alpha / rank (x A) B beside a frozen W.

They are two more parameters of a `Linear`, `lora_a` and `lora_b`, in the same tree: stacked, scanned, sharded and
checkpointed as its kernel is. `lora_b` carries the scale, so that adapters say themselves how they are applied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from mmrm_jax.config import LoraConfig
from mmrm_jax.models.reward import RewardModel

NAMES = ("lora_a", "lora_b")


def init_adapters(params: nnx.State, config: LoraConfig, key: Key[Array, ""]) -> nnx.State:
    """New adapters for the targets among `params` (arrays or ShapeDtypeStructs): A ~ N(0, 1 / inputs), B = 0, float32.

    A kernel [*L, i, o] gets A [*L, i, rank] and B [*L, rank, o], split as the kernel is along the axes they share.
    """
    kernels = {p[:-1]: v for p, v in nnx.to_flat_state(params) if p[-1] == "kernel" and _names(p) & {*config.targets}}
    flat = {}
    for (path, kernel), own in zip(kernels.items(), jax.random.split(key, max(len(kernels), 1)), strict=False):
        *stack, inputs, outputs = kernel.get_value().shape
        *stack_axes, into, out = kernel.get_metadata()["out_sharding"]
        a = jax.random.normal(own, (*stack, inputs, config.rank)) * inputs**-0.5
        b = jnp.zeros((*stack, config.rank, outputs))
        with nnx.use_eager_sharding(False):
            flat[*path, NAMES[0]] = nnx.Param(a, out_sharding=(*stack_axes, into, None))
            flat[*path, NAMES[1]] = nnx.Param(
                b, out_sharding=(*stack_axes, None, out), scale=config.alpha / config.rank
            )
    return nnx.from_flat_state(flat)


def check_targets(params: nnx.State, config: LoraConfig) -> None:
    """Raises ValueError for a target that the model does not have, listing those it has."""
    known = set().union(*(_names(path) for path, _ in nnx.to_flat_state(params) if path[-1] == "kernel"))
    if unknown := sorted(set(config.targets) - known):
        raise ValueError(f"lora.targets names {', '.join(unknown)}; the model has {', '.join(sorted(known))}")


def _names(path: tuple) -> set[str]:
    """What a target may call the kernel at ("decoder", ..., "q", "kernel"): "decoder" or "decoder.q"."""
    return {path[0], f"{path[0]}.{path[-2]}"}


def merge_model(graphdef: nnx.GraphDef, params: nnx.State) -> RewardModel:
    """The model with these parameters, adapters included; `graphdef` is that of the model without any."""
    flat = dict(nnx.to_flat_state(params))
    adapters = {path: flat.pop(path) for path in list(flat) if path[-1] in NAMES}
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    for path, variable in adapters.items():
        *modules, name = map(str, path)
        setattr(functools.reduce(lambda module, at: getattr(module, at), modules, model), name, nnx.data(variable))
    return model


def fold_adapters(params: nnx.State) -> nnx.State:
    """The same model without adapters: W + alpha / rank A B, in float32, in place of each W that has them."""
    flat = dict(nnx.to_flat_state(params))
    for path in [p[:-1] for p in flat if p[-1] == NAMES[0]]:
        a, b = (flat.pop((*path, name)) for name in NAMES)
        kernel = flat[*path, "kernel"]
        added = jnp.matmul(a.get_value(), b.get_value(), precision="highest") * b.get_metadata()["scale"]
        flat[*path, "kernel"] = kernel.replace(kernel.get_value().astype(jnp.float32) + added)
    return nnx.from_flat_state(flat)
