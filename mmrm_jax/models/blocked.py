"""Attention on one CPU, head by head and block by block: scores stay in cache, and none wait for the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

BLOCKS, LEAST_BLOCK = 8, 128  # causal queries: more blocks skip more of what is masked, and take longer to compile
MOST = 384  # queries a block where they see everything: scores of more do not fit into a cache
LONG = 128  # shorter sequences are as fast all at once
ATTENDED = "attended"  # what results are called where a layer chooses what it saves


def blocked_attention(
    q: Float[Array, "G S H E"], k: Float[Array, "G S J E"], v: Float[Array, "G S J E"], *, causal: bool
) -> Float[Array, "G S H E"]:
    """Equal to `jax.nn.dot_product_attention`. The backward pass computes scores again, as flash attention does."""
    groups, length, heads, width = q.shape
    kv_heads, shared = k.shape[2], heads // k.shape[2]
    q = q.reshape(groups, length, kv_heads, shared, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(groups * kv_heads, shared, length, width)
    k, v = (x.swapaxes(1, 2).reshape(groups * kv_heads, length, width) for x in (k, v))
    of_head = jax.checkpoint(functools.partial(_one_head, causal=causal))
    out = jax.lax.map(lambda head: of_head(*head), (q, k, v))
    out = out.reshape(groups, kv_heads, shared, length, width).transpose(0, 3, 1, 2, 4)
    return checkpoint_name(out.reshape(groups, length, heads, width), ATTENDED)


def _one_head(
    q: Float[Array, "N S E"], k: Float[Array, "S E"], v: Float[Array, "S E"], *, causal: bool
) -> Float[Array, "N S E"]:
    """N heads of queries that share one of keys and values."""
    shared, length, width = q.shape
    q = q * width**-0.5
    size = max(LEAST_BLOCK, -(-length // BLOCKS)) if causal else -(-length // -(-length // MOST))
    out = []
    for start in range(0, length, size):
        block = q[:, start : start + size]
        end = start + block.shape[1] if causal else length
        scores = jnp.matmul(block.reshape(-1, width), k[:end].T, preferred_element_type=jnp.float32)
        if causal:
            seen = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
            scores = jnp.where(jnp.tile(seen, (shared, 1)), scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        found = jnp.matmul(weights.astype(v.dtype), v[:end], preferred_element_type=jnp.float32)
        found = found / jnp.sum(weights, axis=-1, keepdims=True)
        out.append(found.astype(v.dtype).reshape(block.shape))
    return jnp.concatenate(out, axis=1)
