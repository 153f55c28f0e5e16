"""One line a tensor: our path <-> its name and layout in InternVL chat checkpoints. Used in both directions."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from mmrm_jax.config import ModelConfig

Layout = Literal["same", "linear", "patches", "lead1"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """`name` has "{}" where the layer's number stands; such a tensor is one slice of a stacked parameter.

    Layouts: "linear" is transposed, "patches" a convolution kernel [D, 3, p, p] as a matrix [3pp, D], "lead1" has
    leading axes of size 1 in the checkpoint.
    """

    path: tuple[str, ...]
    name: str
    layout: Layout = "same"


def _linear(path: tuple[str, ...], name: str, *, bias: bool) -> list[Entry]:
    entries = [Entry((*path, "kernel"), f"{name}.weight", "linear")]
    return [*entries, Entry((*path, "bias"), f"{name}.bias")] if bias else entries


def _norm(path: tuple[str, ...], name: str, *, bias: bool) -> list[Entry]:
    entries = [Entry((*path, "scale"), f"{name}.weight")]
    return [*entries, Entry((*path, "bias"), f"{name}.bias")] if bias else entries


def name_table(config: ModelConfig) -> list[Entry]:
    """Every tensor of a reward model with this configuration."""
    c, lay = config.vision, ("vision", "layers")
    vit, layer_norm = "vision_model.encoder.layers.{}", c.norm == "layer_norm"
    vision = [
        Entry(("vision", "class_embedding"), "vision_model.embeddings.class_embedding", "lead1"),
        Entry(("vision", "position_embedding"), "vision_model.embeddings.position_embedding", "lead1"),
        Entry(("vision", "patch", "kernel"), "vision_model.embeddings.patch_embedding.weight", "patches"),
        Entry(("vision", "patch", "bias"), "vision_model.embeddings.patch_embedding.bias"),
        *_norm((*lay, "norm1"), f"{vit}.norm1", bias=layer_norm),
        *_norm((*lay, "norm2"), f"{vit}.norm2", bias=layer_norm),
        *_linear((*lay, "qkv"), f"{vit}.attn.qkv", bias=c.qkv_bias),
        *_linear((*lay, "proj"), f"{vit}.attn.proj", bias=True),
        *_linear((*lay, "fc1"), f"{vit}.mlp.fc1", bias=True),
        *_linear((*lay, "fc2"), f"{vit}.mlp.fc2", bias=True),
        Entry((*lay, "scale1"), f"{vit}.ls1"),
        Entry((*lay, "scale2"), f"{vit}.ls2"),
    ]
    if c.qk_norm:
        vision += [Entry((*lay, f"{x}_norm", "scale"), f"{vit}.attn.{x}_norm.weight") for x in "qk"]
    projector = [
        *_norm(("projector", "norm"), "mlp1.0", bias=True),
        *_linear(("projector", "fc1"), "mlp1.1", bias=True),
        *_linear(("projector", "fc2"), "mlp1.3", bias=True),
    ]
    return [*vision, *projector, *_decoder(config), Entry(("score",), "score.weight", "lead1")]


def _decoder(config: ModelConfig) -> list[Entry]:
    lay, llm = ("decoder", "layers"), "language_model.model.layers.{}"
    attention = [
        e for x in "qkv" for e in _linear((*lay, x), f"{llm}.self_attn.{x}_proj", bias=config.decoder.qkv_bias)
    ]
    return [
        Entry(("decoder", "embedding"), "language_model.model.embed_tokens.weight"),
        *attention,
        *_linear((*lay, "o"), f"{llm}.self_attn.o_proj", bias=False),
        *_norm((*lay, "norm1"), f"{llm}.input_layernorm", bias=False),
        *_norm((*lay, "norm2"), f"{llm}.post_attention_layernorm", bias=False),
        *[e for x in ("gate", "up", "down") for e in _linear((*lay, x), f"{llm}.mlp.{x}_proj", bias=False)],
        *_norm(("decoder", "norm"), "language_model.model.norm", bias=False),
    ]


def from_hf(array: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """A checkpoint tensor in our layout and (unstacked) shape."""
    if layout == "linear":
        return array.T
    if layout == "patches":
        return array.reshape(array.shape[0], -1).T
    return array.reshape(shape)


def to_hf(array: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `from_hf`; `shape` is the tensor's shape in the checkpoint."""
    return (array.T if layout in ("linear", "patches") else array).reshape(shape)


def hf_shape(shape: tuple[int, ...], entry: Entry, config: ModelConfig) -> tuple[int, ...]:
    """The shape a tensor has in the checkpoint, from our (unstacked) shape."""
    if entry.layout == "linear":
        return shape[::-1]
    if entry.layout == "patches":
        return (shape[1], 3, config.vision.patch_size, config.vision.patch_size)
    if entry.layout == "lead1":
        return (*(1,) * (2 if entry.path[-1] == "class_embedding" else 1), *shape)
    return shape
