"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): y = x W + alpha / rank (x A) B beside a frozen W, by qwix.

They are two more parameters of a `Linear`, in the same tree: stacked, scanned, sharded and checkpointed as its kernel
is. B carries alpha, so that adapters say themselves how they are applied.

qwix is given one `Linear` at a time. Given the whole model it fails: it hangs a generator of random numbers on every
module, which a scan over layers cannot slice. While an adapted `Linear` is traced, qwix 0.1.8 replaces functions of JAX
for the whole process: other threads should not call JAX then (very seldom, such a call raises KeyError).
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from mmrm_jax.config import LoraConfig
from mmrm_jax.models.layers import Linear, stack_layers
from mmrm_jax.models.reward import RewardModel

NAMES = ("kernel_lora_a", "kernel_lora_b")


def init_adapters(params: nnx.State, config: LoraConfig, key: Key[Array, ""]) -> nnx.State:
    """New adapters for the targets among `params` (arrays or ShapeDtypeStructs): A ~ N(0, 1 / inputs), B = 0, float32.

    A kernel [*L, i, o] gets A [*L, i, rank] and B [*L, rank, o], split as the kernel is along the axes they share.
    Raises ValueError for a rank that qwix cannot apply to a kernel.
    """
    kernels = {p[:-1]: v for p, v in nnx.to_flat_state(params) if p[-1] == "kernel" and _names(p) & {*config.targets}}
    for path, kernel in kernels.items():
        _check_rank(".".join(map(str, path)), kernel.get_value().shape, config.rank)

    def draw(key: Key[Array, ""]) -> nnx.State:
        flat = {}
        for (path, kernel), own in zip(kernels.items(), jax.random.split(key, max(len(kernels), 1)), strict=False):
            linear = _new_linear(kernel, config, own)
            flat |= {(*path, name): getattr(linear, name) for name in NAMES}
        return nnx.from_flat_state(flat)

    with nnx.use_eager_sharding(False):
        return jax.jit(draw)(key)  # what is not returned, other kernels, is never allocated


def _check_rank(name: str, shape: tuple[int, ...], rank: int) -> None:
    """Outside a scan, where gradients are taken, qwix tells a kernel by its shape alone, and passes it by in silence
    where an adapter has the same (`find_param` in its flax_util.py)."""
    if len(shape) == 2 and rank in shape:
        raise ValueError(f"lora.rank is {rank}; {name}, of {shape[0]} inputs and {shape[1]} outputs, needs another")


def _new_linear(kernel: nnx.Variable, config: LoraConfig, key: Key[Array, ""]) -> nnx.Module:
    """A `Linear`, or a stack of them, with the shapes and axes of one that has this kernel, and with new adapters."""
    *stack, inputs, outputs = kernel.get_value().shape
    axes = kernel.get_metadata()["out_sharding"][-2:]

    def make(rngs: nnx.Rngs) -> nnx.Module:
        linear = Linear((inputs, outputs), axes, bias=False, rngs=rngs)
        adapted = _adapt(linear, config.rank, config.alpha, jnp.zeros((1, inputs)), rngs=rngs)
        getattr(adapted, NAMES[1]).set_metadata(alpha=config.alpha)
        return adapted

    return stack_layers(make, stack[0], nnx.Rngs(key)) if stack else make(nnx.Rngs(key))


def _adapt(linear: Linear, rank: int, alpha: float, *inputs: Array, **options: Any) -> nnx.Module:
    """A copy that applies adapters; it is called with `inputs` once, which draws them."""
    import qwix  # here, since nothing else needs it

    linear = nnx.clone(linear)
    linear.adapted = True
    normal = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    provider = qwix.LoraProvider(rank=rank, alpha=alpha, lora_a_initializer=normal)
    return cast(nnx.Module, qwix.apply_lora_to_model(linear, provider, *inputs, **options))


def check_targets(params: nnx.State, config: LoraConfig) -> None:
    """Raises ValueError for a target that the model does not have, listing those it has."""
    known = set().union(*(_names(path) for path, _ in nnx.to_flat_state(params) if path[-1] == "kernel"))
    if unknown := sorted(set(config.targets) - known):
        raise ValueError(f"lora.targets names {', '.join(unknown)}; the model has {', '.join(sorted(known))}")


def _names(path: tuple) -> set[str]:
    """What a target may call the kernel at ("decoder", ..., "q", "kernel"): "decoder" or "decoder.q"."""
    return {path[0], f"{path[0]}.{path[-2]}"}


def merge_model(graphdef: nnx.GraphDef, params: nnx.State, dtype: jnp.dtype = jnp.dtype("float32")) -> RewardModel:
    """The model with these parameters, adapters included; `graphdef` is that of the model without any.

    `dtype` is that of the computation: qwix would compute in the adapters' own.
    """
    flat = dict(nnx.to_flat_state(params))
    adapters = {path: flat.pop(path) for path in list(flat) if path[-1] in NAMES}
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    for path in [p[:-1] for p in adapters if p[-1] == NAMES[0]]:
        *modules, at = map(str, path)
        parent = functools.reduce(lambda module, name: getattr(module, name), modules, model)
        a, b = (adapters[*path, name] for name in NAMES)
        rank, alpha = a.get_value().shape[-1], b.get_metadata()["alpha"]
        linear = _adapt(getattr(parent, at), rank, alpha, skip_nnx_init=True, rngs=nnx.Rngs(0))
        for name, variable in zip(NAMES, (a, b), strict=True):
            setattr(linear, name, variable.replace(variable.get_value().astype(dtype)))
        setattr(parent, at, linear)
    return model


def fold_adapters(params: nnx.State) -> nnx.State:
    """The same model without adapters: W + alpha / rank A B, in float32, in place of each W that has them."""
    flat = dict(nnx.to_flat_state(params))
    for path in [p[:-1] for p in flat if p[-1] == NAMES[0]]:
        a, b = (flat.pop((*path, name)) for name in NAMES)
        kernel, scale = flat[*path, "kernel"], b.get_metadata()["alpha"] / a.get_value().shape[-1]
        added = jnp.matmul(a.get_value(), b.get_value(), precision="highest") * scale
        flat[*path, "kernel"] = kernel.replace(kernel.get_value().astype(jnp.float32) + added)
    return nnx.from_flat_state(flat)
