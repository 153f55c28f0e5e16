"""InternViT: the vision tower of InternVL (Chen et al. 2023, arXiv 2312.14238)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from mmrm_jax.config import VisionConfig
from mmrm_jax.models.attention import attention
from mmrm_jax.models.layers import Linear, Norm, apply_layers, param, stack_layers
from mmrm_jax.sharding import by_group


def normalise_pixels(pixels: UInt8[Array, "*B h w 3"], config: VisionConfig) -> Float[Array, "*B h w 3"]:
    """uint8 RGB -> float32, (x / 255 - mean) / std."""
    shape = (1,) * (pixels.ndim - 1) + (3,)
    mean, std = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (config.mean, config.std))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std


class VisionLayer(nnx.Module):
    """Pre-norm transformer layer with layer scale; q/k norm runs over the full width."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        c, rms = config, config.norm == "rms_norm"
        # No tensor axis divides an odd number of heads, such as the 25 of InternViT-6B: they are not split.
        heads = None if c.num_heads % 2 else "vision_heads"
        self.norm1 = Norm(c.width, eps=c.norm_eps, rms=rms, rngs=rngs)
        self.q = Linear((c.width, c.width), ("vision", heads), bias=c.qkv_bias, rngs=rngs)
        self.k = Linear((c.width, c.width), ("vision", heads), bias=c.qkv_bias, rngs=rngs)
        self.v = Linear((c.width, c.width), ("vision", heads), bias=c.qkv_bias, rngs=rngs)
        self.q_norm = Norm(c.width, eps=c.norm_eps, rms=True, rngs=rngs) if c.qk_norm else None
        self.k_norm = Norm(c.width, eps=c.norm_eps, rms=True, rngs=rngs) if c.qk_norm else None
        self.proj = Linear((c.width, c.width), (heads, "vision"), bias=True, rngs=rngs)
        self.scale1 = param(rngs, (c.width,), ("norm",), nnx.initializers.constant(0.1))
        self.norm2 = Norm(c.width, eps=c.norm_eps, rms=rms, rngs=rngs)
        self.fc1 = Linear((c.width, c.mlp_width), ("vision", "mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear((c.mlp_width, c.width), ("mlp", "vision"), bias=True, rngs=rngs)
        self.scale2 = param(rngs, (c.width,), ("norm",), nnx.initializers.constant(0.1))
        self.num_heads = c.num_heads

    def __call__(self, x: Float[Array, "I S D"], keep: Float[Array, "I 2"] | None = None) -> Float[Array, "I S D"]:
        """`keep` multiplies what attention and MLP add, tile by tile: drop path."""
        added = self.attend(self.norm1(x)) * self.scale1[...].astype(x.dtype)[None, None]
        x = x + (added if keep is None else added * keep[:, 0].astype(x.dtype)[:, None, None])
        hidden = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)
        added = self.fc2(hidden) * self.scale2[...].astype(x.dtype)[None, None]
        return x + (added if keep is None else added * keep[:, 1].astype(x.dtype)[:, None, None])

    def attend(self, x: Float[Array, "I S D"]) -> Float[Array, "I S D"]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, k, v))
        return self.proj(attention(q, k, v, causal=False).reshape(x.shape))


def drop_path(rate: float, num_layers: int, keys: Key[Array, " I"]) -> Float[Array, "L I 2"]:
    """Factors of stochastic depth (Huang et al. 2016, arXiv 1603.09382): 0 at the layer's rate, else 1 / (1 - rate).

    Every tile draws for each layer's attention and MLP from its own key. Rates grow linearly from 0 to `rate`.
    """
    rates = jnp.linspace(0.0, rate, num_layers)[:, None, None]
    draws = jax.vmap(lambda key: jax.random.uniform(key, (num_layers, 2)), out_axes=1)(keys)
    return jnp.where(draws < rates, 0.0, 1 / (1 - rates))


def cubic_weights(old: int, new: int) -> np.ndarray:
    """[new, old] in float32: bicubic resizing along one axis as a matrix.

    Keys' kernel (1981) with a = -0.75, pixel centres at (i + 1/2) * old / new - 1/2, edges repeated, no antialiasing:
    torch's `interpolate(mode="bicubic", align_corners=False)`.
    """
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        source = np.floor(centres).astype(int) + offset
        x = np.abs(centres - source)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        np.add.at(weights, (np.arange(new), np.clip(source, 0, old - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


class VisionTower(nnx.Module):
    """Pixels of I tiles -> hidden states of the selected layer, class token first."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        c = config
        patches = ((c.position_image_size or c.image_size) // c.patch_size) ** 2
        self.patch = Linear((3 * c.patch_size**2, c.width), (None, "vision"), bias=True, rngs=rngs)
        self.class_embedding = param(rngs, (c.width,), ("norm",))
        self.position_embedding = param(rngs, (1 + patches, c.width), (None, "vision"))
        self.layers = stack_layers(lambda r: VisionLayer(c, r), c.num_layers, rngs)
        self.config = c

    def positions(self) -> Float[Array, "S D"]:
        """The position table for tiles of `image_size`: resized in every forward, so that checkpoints keep theirs."""
        c, table = self.config, self.position_embedding[...].astype(jnp.float32)
        if c.position_image_size is None:
            return table
        old, new = c.position_image_size // c.patch_size, c.image_size // c.patch_size
        weights, grid = jnp.asarray(cubic_weights(old, new)), table[1:].reshape(old, old, c.width)
        resized = jnp.einsum("hi,wj,ijd->hwd", weights, weights, grid, precision="highest")
        return jnp.concatenate([table[:1], resized.reshape(new * new, c.width)])

    @jax.named_scope("vision")
    def __call__(
        self,
        pixels: UInt8[Array, "I h w 3"],
        *,
        select_layer: int = -1,
        dtype: jnp.dtype = jnp.dtype("float32"),
        keys: Key[Array, " I"] | None = None,
    ) -> Float[Array, "I S D"]:
        """`keys`, one a tile, turn on drop path."""
        c = self.config
        x = normalise_pixels(pixels, c)
        i, side = x.shape[0], c.image_size // c.patch_size
        x = x.reshape(i, side, c.patch_size, side, c.patch_size, 3).transpose(0, 1, 3, 5, 2, 4)
        x = by_group(self.patch(x.reshape(i, side * side, -1).astype(dtype)))
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype)[None, None], (i, 1, c.width))
        x = jnp.concatenate([first, x], axis=1) + self.positions().astype(dtype)[None]
        depth = select_layer if select_layer >= 0 else c.num_layers + 1 + select_layer
        keep = None if keys is None or not c.drop_path_rate else drop_path(c.drop_path_rate, c.num_layers, keys)

        def step(layer: VisionLayer, x: Array, keep: Array | None) -> tuple[Array, None]:
            return by_group(layer(x, keep)), None

        return apply_layers(self.layers, depth, step, by_group(x), keep, remat=c.remat)[0]
