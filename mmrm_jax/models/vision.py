"""InternViT: the vision tower of InternVL (Chen et al. 2023, arXiv 2312.14238)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from mmrm_jax.config import VisionConfig
from mmrm_jax.models.layers import Linear, Norm, apply_layers, param, stack_layers


def normalise_pixels(pixels: UInt8[Array, "*B h w 3"], config: VisionConfig) -> Float[Array, "*B h w 3"]:
    """uint8 RGB -> float32, (x / 255 - mean) / std."""
    shape = (1,) * (pixels.ndim - 1) + (3,)
    mean, std = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (config.mean, config.std))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std


class VisionLayer(nnx.Module):
    """Pre-norm transformer layer with layer scale; q/k norm runs over the full width."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        c, rms = config, config.norm == "rms_norm"
        self.norm1 = Norm(c.width, eps=c.norm_eps, rms=rms, rngs=rngs)
        self.qkv = Linear((c.width, 3 * c.width), ("vision", "vision_heads"), bias=c.qkv_bias, rngs=rngs)
        self.q_norm = Norm(c.width, eps=c.norm_eps, rms=True, rngs=rngs) if c.qk_norm else None
        self.k_norm = Norm(c.width, eps=c.norm_eps, rms=True, rngs=rngs) if c.qk_norm else None
        self.proj = Linear((c.width, c.width), ("vision_heads", "vision"), bias=True, rngs=rngs)
        self.scale1 = param(rngs, (c.width,), ("norm",), nnx.initializers.constant(0.1))
        self.norm2 = Norm(c.width, eps=c.norm_eps, rms=rms, rngs=rngs)
        self.fc1 = Linear((c.width, c.mlp_width), ("vision", "mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear((c.mlp_width, c.width), ("mlp", "vision"), bias=True, rngs=rngs)
        self.scale2 = param(rngs, (c.width,), ("norm",), nnx.initializers.constant(0.1))
        self.num_heads = c.num_heads

    def __call__(self, x: Float[Array, "I S D"]) -> Float[Array, "I S D"]:
        x = x + self.attend(self.norm1(x)) * self.scale1[...].astype(x.dtype)[None, None]
        hidden = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)
        return x + self.fc2(hidden) * self.scale2[...].astype(x.dtype)[None, None]

    def attend(self, x: Float[Array, "I S D"]) -> Float[Array, "I S D"]:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, k, v))
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class VisionTower(nnx.Module):
    """Pixels of I tiles -> hidden states of the selected layer, class token first."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        c = config
        patches = (c.image_size // c.patch_size) ** 2
        self.patch = Linear((3 * c.patch_size**2, c.width), (None, "vision"), bias=True, rngs=rngs)
        self.class_embedding = param(rngs, (c.width,), ("norm",))
        self.position_embedding = param(rngs, (1 + patches, c.width), (None, "vision"))
        self.layers = stack_layers(lambda r: VisionLayer(c, r), c.num_layers, rngs)
        self.config = c

    def __call__(
        self, pixels: UInt8[Array, "I h w 3"], *, select_layer: int = -1, dtype: jnp.dtype = jnp.dtype("float32")
    ) -> Float[Array, "I S D"]:
        c = self.config
        x = normalise_pixels(pixels, c)
        i, side = x.shape[0], c.image_size // c.patch_size
        x = x.reshape(i, side, c.patch_size, side, c.patch_size, 3).transpose(0, 1, 3, 5, 2, 4)
        x = self.patch(x.reshape(i, side * side, -1).astype(dtype))
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype)[None, None], (i, 1, c.width))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(dtype)[None]
        depth = select_layer if select_layer >= 0 else c.num_layers + 1 + select_layer
        return apply_layers(self.layers, depth, lambda layer, x: layer(x), x)
