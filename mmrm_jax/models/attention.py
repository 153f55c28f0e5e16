"""Attention by the kernel that suits the device: over one sequence, and of N responses to the prefix they share.

XLA's, on one CPU in blocks, splash attention on TPUs, cuDNN's on NVIDIA GPUs where it takes the shapes; all give the
same numbers. All but XLA's whole matrices keep no scores in memory, neither forward nor backward.
"""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmrm_jax.models.blocked import LONG, MOST, blocked_attention
from mmrm_jax.sharding import on_each_device, on_one_cpu

Kernel: TypeAlias = Literal["xla", "cudnn", "splash"]

FAR = 2.0**40  # what a masked score is lowered by; exact in bfloat16, and far beyond what exp sees as 0


def best_kernel(dtype: jnp.dtype, width: int) -> Kernel:
    """The kernel for heads of `width` in `dtype` on the devices of the mesh that is set, or on the default device.

    The mesh goes first, since a step may be traced for devices that are not at hand. cuDNN's flash attention takes half
    precision and heads up to 128 wide, in eights, on Ampere and later (jax/_src/cudnn/fused_attention_stablehlo.py).
    """
    here, mesh = jax.devices()[0], jax.sharding.get_abstract_mesh()
    platform = here.platform if mesh.abstract_device is None else mesh.abstract_device.platform
    if platform == "tpu":
        return "splash"
    if platform == here.platform == "gpu" and "NVIDIA" in here.device_kind and float(here.compute_capability) >= 8:
        half = dtype in (jnp.dtype("bfloat16"), jnp.dtype("float16"))
        return "cudnn" if half and width <= 128 and width % 8 == 0 else "xla"
    return "xla"


@jax.named_scope("attention")
def attention(
    q: Float[Array, "G S H E"], k: Float[Array, "G S J E"], v: Float[Array, "G S J E"], *, causal: bool
) -> Float[Array, "G S H E"]:
    """Grouped-query attention over one sequence. Where causal, right padding needs no mask: no valid query sees it."""
    match best_kernel(q.dtype, q.shape[-1]):
        case "splash":
            run = functools.partial(splash, offset=0 if causal else None)
            return on_each_device(run, q * q.shape[-1] ** -0.5, k, v)
        case "cudnn":
            return on_each_device(functools.partial(cudnn, causal=causal), q, k, v)
        case _ if q.shape[1] >= LONG and on_one_cpu():
            return blocked_attention(q, k, v, causal=causal)
        case _:
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


@jax.named_scope("attention")
def response_attention(
    q: Float[Array, "G K L H E"],
    k: Float[Array, "G K L J E"],
    v: Float[Array, "G K L J E"],
    positions: Int[Array, "G K L"],
    prefix_k: Float[Array, "G P J E"],
    prefix_v: Float[Array, "G P J E"],
    prefix_lengths: Int[Array, " G"],
) -> Float[Array, "G K L H E"]:
    """Responses, packed as `types.Responses` says, attend to their group's valid prefix and causally to themselves.

    Equal, in one softmax, to causal attention over the concatenation [prefix, response], without copies of the prefix.

    GPUs use XLA here: cuDNN takes such a mask only as a bias, of which it also computes the gradient, and to merge two
    calls, of prefix and responses, their log-sum-exp would need a gradient, which it does not have.
    """
    arguments = (q, k, v, positions, prefix_k, prefix_v, prefix_lengths)
    if best_kernel(q.dtype, q.shape[-1]) == "splash":
        return on_each_device(splash_responses, *arguments)
    if not on_one_cpu():
        return xla_responses(*arguments)
    # Scores of few queries fit into a CPU's cache: up to twice as fast as all groups at once, and a step's memory too.
    return jax.lax.map(lambda group: _by_rows(*(x[None] for x in group))[0], arguments)


def _by_rows(q: Array, k: Array, v: Array, positions: Array, *prefix: Array) -> Array:
    """`xla_responses` of one group, in equal parts of its rows with no more than `MOST` queries, or of one row."""
    rows, length = q.shape[1:3]
    count = -(-rows // max(1, MOST // length))
    if count == 1:
        return xla_responses(q, k, v, positions, *prefix)
    size = -(-rows // count)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x[0], ((0, count * size - rows), *((0, 0) for _ in x.shape[2:])))
        return padded.reshape(count, 1, size, *x.shape[2:])

    out = jax.lax.map(lambda part: xla_responses(*part, *prefix), tuple(map(cut, (q, k, v, positions))))
    return out.reshape(1, count * size, *q.shape[2:])[:, :rows]


def xla_responses(
    q: Array, k: Array, v: Array, positions: Array, prefix_k: Array, prefix_v: Array, prefix_lengths: Array
) -> Array:
    """`response_attention` as plain array code."""
    groups, n, r, heads, width = q.shape
    kv_heads, p = k.shape[3], prefix_k.shape[1]
    q = (q * width**-0.5).reshape(groups, n, r, kv_heads, heads // kv_heads, width)
    to_prefix = jnp.einsum("gnrkje,gpke->gknjrp", q, prefix_k, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("gnrkje,gnske->gknjrs", q, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(p)[None, :] < prefix_lengths[:, None]
    low = jnp.finfo(jnp.float32).min
    to_prefix = jnp.where(seen[:, None, None, None, None, :], to_prefix, low)
    starts = jnp.arange(r)[None, None] - positions  # tokens of one row that start together are of one response
    own = (starts[..., :, None] == starts[..., None, :]) & jnp.tril(jnp.ones((r, r), bool))[None, None]
    to_self = jnp.where(own[:, None, :, None], to_self, low)
    # The softmax over both is divided by its sum after the values are weighted, where there is less to divide.
    highest = jnp.maximum(jnp.max(to_prefix, axis=-1), jnp.max(to_self, axis=-1))[..., None]
    to_prefix, to_self = (jnp.exp(x - jax.lax.stop_gradient(highest)) for x in (to_prefix, to_self))
    total = jnp.sum(to_prefix, axis=-1) + jnp.sum(to_self, axis=-1)
    out = jnp.einsum("gknjrp,gpke->gnrkje", to_prefix.astype(v.dtype), prefix_v, preferred_element_type=jnp.float32)
    out = out + jnp.einsum("gknjrs,gnske->gnrkje", to_self.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / total.transpose(0, 2, 4, 1, 3)[..., None]
    return out.astype(v.dtype).reshape(groups, n, r, heads, width)


def cudnn(
    q: Float[Array, "G S H E"], k: Float[Array, "G S J E"], v: Float[Array, "G S J E"], *, causal: bool
) -> Float[Array, "G S H E"]:
    """cuDNN's flash attention. Its gradient wants an even length: padding at the end, which no valid query sees."""
    groups, length = q.shape[:2]
    q, k, v = (_pad(x, length % 2) for x in (q, k, v))
    valid = None if causal or length % 2 == 0 else jnp.full(groups, length, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=valid, implementation="cudnn")
    return out[:, :length]


def splash(
    q: Float[Array, "G T H E"],
    k: Float[Array, "G S J E"],
    v: Float[Array, "G S J D"],
    *,
    offset: int | None,
    interpret: bool = False,
) -> Float[Array, "G T H D"]:
    """Splash attention, of queries that are scaled already; on other devices than TPUs it is interpreted, slowly.

    With an `offset` query t sees keys 0 to t + offset, and there are T + offset of them; without, it sees all.
    Sequences are padded to whole blocks at the end, where no valid query sees them.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    (queries, heads), keys = q.shape[1:3], k.shape[1]
    by_q, by_k = block_size(queries), block_size(keys)
    q, k, v = (_pad(x, -x.shape[1] % block).swapaxes(1, 2) for x, block in ((q, by_q), (k, by_k), (v, by_k)))
    sides = q.shape[2], k.shape[2]
    if offset is None:
        mask = np.broadcast_to(np.arange(sides[1]) < keys, (heads, *sides))
    else:
        mask = lib.MultiHeadMask([lib.CausalMask(sides, offset)] * heads)
    blocks = lib.BlockSizes(
        block_q=by_q, block_kv=by_k, block_q_dkv=by_q, block_kv_dkv=by_k, block_q_dq=by_q, block_kv_dq=by_k
    )
    kernel = lib.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
    out: Array = jax.vmap(kernel)(q, k, v)  # type: ignore[assignment]  # what saves no residuals returns one array
    return out.swapaxes(1, 2)[:, :queries]


def splash_responses(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    prefix_k: Array,
    prefix_v: Array,
    prefix_lengths: Array,
    *,
    interpret: bool = False,
) -> Array:
    """`response_attention` as one splash call: the group's rows, one after another, look at [prefix, rows] causally.

    That a token sees no other response and no padding of the prefix is said by further channels of q and k, whose
    product is 0 for what it sees and at most -FAR for all else: two for each bit of where the token's response starts,
    which differ in sign and so meet only where the bits differ, and one for the prefix's padding.
    """
    groups, rows, length, heads, width = q.shape
    tokens, p = rows * length, prefix_k.shape[1]
    starts = jnp.arange(tokens)[None] - positions.reshape(groups, tokens)
    bits = (starts[..., None] >> jnp.arange((tokens - 1).bit_length())[None, None]) & 1
    one = jnp.ones_like(starts)[..., None]
    padding = (jnp.arange(p)[None] >= prefix_lengths[:, None]).astype(jnp.int32)[..., None]
    looks = jnp.concatenate([bits, 1 - bits, one], axis=-1)
    hides = jnp.concatenate([1 - bits, bits, 0 * one], axis=-1)
    hides = jnp.concatenate([jnp.pad(padding, ((0, 0), (0, 0), (2 * bits.shape[-1], 0))), hides], axis=1)

    def extend(x: Array, channels: Array) -> Array:
        channels = jnp.broadcast_to(channels[:, :, None], (*x.shape[:3], channels.shape[-1]))
        return jnp.concatenate([x, channels], axis=-1)

    q, k, v = (x.reshape(groups, tokens, -1, width) for x in (q, k, v))
    q = extend(q * width**-0.5, looks.astype(q.dtype))
    k = extend(jnp.concatenate([prefix_k, k], axis=1), hides.astype(k.dtype) * -FAR)
    v = jnp.concatenate([prefix_v, v], axis=1)
    return splash(q, k, v, offset=p, interpret=interpret).reshape(groups, rows, length, heads, width)


def block_size(length: int) -> int:
    """The side of splash attention's blocks, in multiples of 128: the largest of those that pad least."""
    return 128 if length <= 128 else min((512, 384, 256), key=lambda block: -length % block)


def _pad(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))
