"""InternVL: visual features take the place of image tokens in the decoder's input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from mmrm_jax.config import ModelConfig
from mmrm_jax.models.decoder import Decoder
from mmrm_jax.models.layers import Linear, Norm
from mmrm_jax.models.vision import VisionTower
from mmrm_jax.sharding import by_group
from mmrm_jax.types import Prefix, Responses


def pixel_shuffle(x: Float[Array, "I h w D"], ratio: float, version: str) -> Float[Array, "I h2 w2 D2"]:
    """Trade resolution for width: 1/ratio squared neighbouring patches become one visual token.

    "v1" leaves the result transposed, as the first InternVL release did.
    """
    i, h, w, d = x.shape
    x = x.reshape(i, h, int(w * ratio), int(d / ratio)).transpose(0, 2, 1, 3)
    x = x.reshape(i, int(w * ratio), int(h * ratio), int(d / ratio**2))
    return x if version == "v1" else x.transpose(0, 2, 1, 3)


def tile_features(
    vision: VisionTower,
    tiles: UInt8[Array, "B h w 3"],
    config: ModelConfig,
    dtype: jnp.dtype,
    keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B V I"]:
    """What the tower alone makes of each tile, on its own: patches of the selected layer, shuffled.

    `keys`, one a tile, turn on drop path.
    """
    hidden = vision(tiles, select_layer=config.select_layer, dtype=dtype, keys=keys)
    side = config.vision.image_size // config.vision.patch_size
    patches = hidden[:, 1:].reshape(len(tiles), side, side, -1)
    shuffled = pixel_shuffle(patches, config.downsample_ratio, config.pixel_shuffle)
    return shuffled.reshape(len(tiles), config.visual_tokens_per_tile, -1)


class Projector(nnx.Module):
    """Layer norm and a two-layer MLP from shuffled patches to the decoder's width (`mlp1` in checkpoints)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        inner = int(config.vision.width / config.downsample_ratio**2)
        width = config.decoder.width
        self.norm = Norm(inner, eps=1e-5, rms=False, rngs=rngs)
        self.fc1 = Linear((inner, width), ("vision", "mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear((width, width), ("mlp", "embed"), bias=True, rngs=rngs)

    @jax.named_scope("projector")
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B D"]:
        hidden = by_group(self.fc1(by_group(self.norm(x))), "mlp")
        return by_group(self.fc2(jax.nn.gelu(hidden, approximate=False)))


class InternVL(nnx.Module):
    """Vision tower, projector and decoder."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, rngs)
        self.projector = Projector(config, rngs)
        self.decoder = Decoder(config.decoder, rngs)
        self.config = config

    def visual_features(
        self,
        tiles: UInt8[Array, "G T h w 3"] | Float[Array, "G T V I"],
        dtype: jnp.dtype,
        keys: Key[Array, " G"] | None = None,
    ) -> Float[Array, "G TV D"]:
        """Visual tokens of each group's tiles, pixels or their `tile_features`, in tile order."""
        g, t = tiles.shape[:2]
        if jnp.issubdtype(tiles.dtype, jnp.floating):
            features = tiles.astype(dtype)
        else:
            if keys is not None:  # a tile's draws depend on its group's key and its place, not on how many are padded
                each = jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (None, 0))(k, jnp.arange(t)))
                keys = each(keys).reshape(g * t)
            features = tile_features(self.vision, tiles.reshape(g * t, *tiles.shape[2:]), self.config, dtype, keys)
        return self.projector(features.reshape(g, t * self.config.visual_tokens_per_tile, -1))

    def embed_prefix(
        self, prefix: Prefix, dtype: jnp.dtype, keys: Key[Array, " G_or_1"] | None = None
    ) -> Float[Array, "G P D"]:
        """Token embeddings with visual features in their places."""
        x = self.decoder.embed(prefix.tokens, dtype)
        tiles = prefix.pixels if prefix.features is None else prefix.features
        if tiles is None:
            return x
        features = self.visual_features(tiles, dtype, keys)
        index = prefix.visual_index
        features = jnp.broadcast_to(features, (index.shape[0], *features.shape[1:]))
        placed = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
        return by_group(jnp.where(index[..., None] >= 0, placed, x))

    def read_prefix(self, prefix: Prefix, dtype: jnp.dtype) -> Float[Array, "G 2 layers P J E"]:
        """Keys and values of each group's prefix in every layer of the decoder."""
        keys, values = self.decoder.keys_values(self.embed_prefix(prefix, dtype))
        return by_group(jnp.stack([keys, values]).transpose(2, 0, 1, 3, 4, 5))

    def __call__(
        self,
        prefix: Prefix,
        responses: Responses,
        dtype: jnp.dtype,
        keys: Key[Array, " G_or_1"] | None = None,
        *,
        whole: bool = True,
    ) -> tuple[Float[Array, "G P D"], Float[Array, "G K L D"]]:
        """Final hidden states of the prefix, which mean nothing without `whole`, and of every response token.

        `keys`, one for each group that has pixels of its own, turn on drop path in the vision tower.
        """
        embedded = self.decoder.embed(responses.tokens, dtype)
        embedded_prefix = self.embed_prefix(prefix, dtype, keys)
        return self.decoder(embedded_prefix, prefix.lengths, embedded, responses.positions, whole=whole)
