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
    q: Float[Array, "G N R H E"],
    k: Float[Array, "G N R K E"],
    v: Float[Array, "G N R K E"],
    prefix_k: Float[Array, "G P K E"],
    prefix_v: Float[Array, "G P K E"],
    prefix_lengths: Int[Array, " G"],
) -> Float[Array, "G N R H E"]:
    """Responses attend to their group's valid prefix and causally to themselves, in one softmax.

    Equal to causal attention over the concatenation [prefix, response], without N copies of the prefix.
    """
    groups, n, r, heads, width = q.shape
    kv_heads, p = k.shape[3], prefix_k.shape[1]
    q = (q * width**-0.5).reshape(groups, n, r, kv_heads, heads // kv_heads, width)
    to_prefix = jnp.einsum("gnrkje,gpke->gknjrp", q, prefix_k, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("gnrkje,gnske->gknjrs", q, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(p)[None, :] < prefix_lengths[:, None]
    low = jnp.finfo(jnp.float32).min
    to_prefix = jnp.where(seen[:, None, None, None, None, :], to_prefix, low)
    to_self = jnp.where(jnp.tril(jnp.ones((r, r), bool))[None, None, None, None], to_self, low)
    weights = jax.nn.softmax(jnp.concatenate([to_prefix, to_self], axis=-1), axis=-1).astype(v.dtype)
    out = jnp.einsum("gknjrp,gpke->gnrkje", weights[..., :p], prefix_v)
    out = out + jnp.einsum("gknjrs,gnske->gnrkje", weights[..., p:], v)
    return out.reshape(groups, n, r, heads, width)
