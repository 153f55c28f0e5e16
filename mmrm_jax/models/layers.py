"""Building blocks shared by the vision tower and the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mmrm_jax.config import Remat
from mmrm_jax.models.blocked import ATTENDED
from mmrm_jax.sharding import on_one_cpu

LINEAR = "linear"  # what results of products with weights are called where a layer chooses what it saves

UNROLLED = 4  # layers; stacks up to this depth are unrolled

# What a backward pass finds saved of a layer; the rest it computes again. "full" saves nothing but the layer's input;
# "none", which saves everything elsewhere, saves on a CPU what attention gave in blocks: products with weights take
# little longer to compute again than to write and read, and are half of a step's memory.
POLICIES: Mapping[Remat, Callable] = {
    "none": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable | None = None
) -> nnx.Param:
    """A float32 parameter with logical axis names; normal(0.02) unless told otherwise."""
    init = nnx.initializers.normal(0.02) if init is None else init
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


@jax.custom_vjp
def product(x: Float[Array, "*B i"], kernel: Float[Array, "i o"]) -> Float[Array, "*B o"]:
    """`jnp.dot`, whose gradient of the kernel is x^T g as it stands.

    That of `jnp.dot` is (g^T x)^T, for which XLA's CPU compiler writes g anew, transposed, and computes what is fused
    into it twice: forward and backward of a SwiGLU take half as long again.
    """
    return jnp.dot(x, kernel)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.dot(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    return jnp.dot(gradient, kernel.T), jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))


product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """y = x W (+ b) over the last axis, computed in the input's dtype.

    A bias over the model's width is not split: it is too small to be worth gathering. `models.lora` adds what adapters
    give to the result of `jnp.dot`, where `adapted`; that of `product` or `x @ W` would be out of its reach.
    """

    def __init__(self, sizes: tuple[int, int], axes: tuple[str | None, str | None], *, bias: bool, rngs: nnx.Rngs):
        self.kernel = param(rngs, sizes, axes, nnx.initializers.lecun_normal())
        bias_axis = "norm" if axes[1] in ("embed", "vision") else axes[1]
        self.bias = param(rngs, sizes[1:], (bias_axis,), nnx.initializers.zeros) if bias else None
        self.adapted = False

    def __call__(self, x: Float[Array, "*B i"]) -> Float[Array, "*B o"]:
        y = (jnp.dot if self.adapted else product)(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:  # in float32, as which its gradient is then summed: over many tokens bfloat16 stops
            y = (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
        return checkpoint_name(y, LINEAR)


class Norm(nnx.Module):
    """Layer norm, or RMS norm without mean and bias; statistics in float32."""

    def __init__(self, size: int, *, eps: float, rms: bool, rngs: nnx.Rngs):
        self.scale = param(rngs, (size,), ("norm",), nnx.initializers.ones)
        self.bias = None if rms else param(rngs, (size,), ("norm",), nnx.initializers.zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` modules as one whose parameters carry a leading, logical "layers" axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0, axis_size=num_layers, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def apply_layers(
    layers: nnx.Module,
    num_layers: int,
    step: Callable,
    carry,
    *extra: Array | None,
    remat: Remat = "none",
):
    """Run `step(layer, carry, *extra of that layer) -> carry, kept` over the first `num_layers` stacked layers.

    Returns the last carry, and what was kept (or None) with an axis of layers before it.

    Short stacks are unrolled, which lets XLA drop what the last layer computes for nobody. `remat` says what a backward
    pass finds saved: everything it needs ("none", but for `POLICIES` on one CPU), results of matrix products with
    weights ("dots"), or each layer's input ("full").
    """
    unrolled = num_layers <= UNROLLED
    graphdef, params = nnx.split(layers)
    stacked = jax.tree.map(lambda x: x[:num_layers], (params, extra))

    def body(carry, of_layer):
        layer_params, extra = of_layer
        return step(nnx.merge(graphdef, layer_params), carry, *extra)

    if remat != "none" or (on_one_cpu() and not unrolled):
        # Inside a loop the compiler cannot undo it by sharing what is computed twice.
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=unrolled)
    return jax.lax.scan(body, carry, stacked, unroll=unrolled or 1)
