"""Attention: causal over one sequence, and of N responses to the prefix they share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_attention(
    q: Float[Array, "G P H E"], k: Float[Array, "G P K E"], v: Float[Array, "G P K E"]
) -> Float[Array, "G P H E"]:
    """Causal grouped-query attention. Right padding needs no mask: no valid query can see it."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


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
    """
    arguments = (q, k, v, positions, prefix_k, prefix_v, prefix_lengths)
    if jax.default_backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return _response_attention(*arguments)
    # One group's scores fit into a CPU's cache: up to twice as fast as all groups at once.
    return jax.lax.map(lambda group: _response_attention(*(x[None] for x in group))[0], arguments)


def _response_attention(
    q: Array, k: Array, v: Array, positions: Array, prefix_k: Array, prefix_v: Array, prefix_lengths: Array
) -> Array:
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
