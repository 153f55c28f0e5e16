"""One line a tensor: our path <-> its name and layout in checkpoints. Used in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from mmrm_jax.config import DecoderConfig, ModelConfig, VisionConfig

CheckpointLayout = Literal[
    "chat", "native"
]  # InternVL's own, and that of transformers' InternVLForConditionalGeneration
Layout = Literal["same", "linear", "patches", "lead1"]
Branch = Literal["primary", "proxy"]

# A reward model that was trained with its proxy holds the proxy whole, under this prefix.
PROXY_PREFIX = "bias_reward_model."

# Tensors a checkpoint may hold that a reward model has no use for: the LM head.
UNUSED = frozenset({"language_model.lm_head.weight", "language_model.output.weight"})

# Names in the native model's `state_dict` -> those its `save_pretrained` writes, which the table uses.
_NATIVE_ALIASES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a packed tensor of `total` rows are a parameter's: `block` of every `stride`, from `start` on.

    Row r of the parameter is row r // block * stride + start + r % block of the tensor.
    """

    start: int
    block: int
    stride: int
    total: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """`name` has "{}" where the layer's number stands; such a tensor is one slice of a stacked parameter.

    Layouts: "linear" is transposed, "patches" a convolution kernel [D, 3, p, p] as a matrix [3pp, D], "lead1" has
    leading axes of size 1 in the checkpoint. With `rows` the tensor is packed: entries of the same name share it.
    """

    path: tuple[str, ...]
    name: str
    layout: Layout = "same"
    rows: Rows | None = None


def name_table(config: ModelConfig, layout: CheckpointLayout = "chat") -> list[Entry]:
    """Every parameter of a reward model with this configuration."""
    if layout == "native":
        vision, vit = _native_vision(config.vision), "vision_tower.embeddings"
        embeddings = [f"{vit}.{x}" for x in ("cls_token", "position_embeddings", "patch_embeddings.projection")]
        projector = [f"multi_modal_projector.{x}" for x in ("layer_norm", "linear_1", "linear_2")]
    else:
        vision, vit = _chat_vision(config.vision), "vision_model.embeddings"
        embeddings = [f"{vit}.{x}" for x in ("class_embedding", "position_embedding", "patch_embedding")]
        projector = ["mlp1.0", "mlp1.1", "mlp1.3"]
    return [
        Entry(("vision", "class_embedding"), embeddings[0], "lead1"),
        Entry(("vision", "position_embedding"), embeddings[1], "lead1"),
        Entry(("vision", "patch", "kernel"), f"{embeddings[2]}.weight", "patches"),
        Entry(("vision", "patch", "bias"), f"{embeddings[2]}.bias"),
        *vision,
        *_norm(("projector", "norm"), projector[0], bias=True),
        *_linear(("projector", "fc1"), projector[1], bias=True),
        *_linear(("projector", "fc2"), projector[2], bias=True),
        *_decoder(config.decoder, "language_model.model"),
        Entry(("score",), "score.weight", "lead1"),
    ]


def checkpoint_layout(names: Iterable[str]) -> CheckpointLayout:
    """The layout that a checkpoint's tensors are named after."""
    native = ("model.vision_tower.", "vision_tower.")
    return "native" if any(name.startswith(native) for name in names) else "chat"


def canonical_name(name: str, layout: CheckpointLayout) -> str:
    """The name in the table, for a tensor that may go by an alias."""
    if layout == "native":
        for alias, own in _NATIVE_ALIASES:
            if name.startswith(alias):
                return own + name.removeprefix(alias)
    return name


def _linear(path: tuple[str, ...], name: str, *, bias: bool, rows: Rows | None = None) -> list[Entry]:
    entries = [Entry((*path, "kernel"), f"{name}.weight", "linear", rows)]
    return [*entries, Entry((*path, "bias"), f"{name}.bias", rows=rows)] if bias else entries


def _packed(path: tuple[str, ...], parts: Sequence[tuple[str, int]], name: str, *, bias: bool, groups: int = 1) -> list:
    """Linear layers of the given (name, rows) in one tensor: `groups` times a piece of each, in this order."""
    entries, start, total = [], 0, sum(size for _, size in parts)
    for part, size in parts:
        rows = Rows(start, size // groups, total // groups, total)
        entries += _linear((*path, part), name, bias=bias, rows=rows)
        start += size // groups
    return entries


def _norm(path: tuple[str, ...], name: str, *, bias: bool) -> list[Entry]:
    entries = [Entry((*path, "scale"), f"{name}.weight")]
    return [*entries, Entry((*path, "bias"), f"{name}.bias")] if bias else entries


def _chat_vision(c: VisionConfig) -> list[Entry]:
    lay, vit, layer_norm = ("vision", "layers"), "vision_model.encoder.layers.{}", c.norm == "layer_norm"
    return [
        *_norm((*lay, "norm1"), f"{vit}.norm1", bias=layer_norm),
        *_norm((*lay, "norm2"), f"{vit}.norm2", bias=layer_norm),
        *_packed(lay, [(x, c.width) for x in "qkv"], f"{vit}.attn.qkv", bias=c.qkv_bias),
        *_vision_norms(c, f"{vit}.attn"),
        *_linear((*lay, "proj"), f"{vit}.attn.proj", bias=True),
        *_linear((*lay, "fc1"), f"{vit}.mlp.fc1", bias=True),
        *_linear((*lay, "fc2"), f"{vit}.mlp.fc2", bias=True),
        Entry((*lay, "scale1"), f"{vit}.ls1"),
        Entry((*lay, "scale2"), f"{vit}.ls2"),
    ]


def _native_vision(c: VisionConfig) -> list[Entry]:
    lay, vit, layer_norm = ("vision", "layers"), "vision_tower.encoder.layer.{}", c.norm == "layer_norm"
    return [
        *_norm((*lay, "norm1"), f"{vit}.layernorm_before", bias=layer_norm),
        *_norm((*lay, "norm2"), f"{vit}.layernorm_after", bias=layer_norm),
        *[e for x in "qkv" for e in _linear((*lay, x), f"{vit}.attention.{x}_proj", bias=c.qkv_bias)],
        *_vision_norms(c, f"{vit}.attention"),
        *_linear((*lay, "proj"), f"{vit}.attention.projection_layer", bias=True),
        *_linear((*lay, "fc1"), f"{vit}.mlp.fc1", bias=True),
        *_linear((*lay, "fc2"), f"{vit}.mlp.fc2", bias=True),
        Entry((*lay, "scale1"), f"{vit}.lambda_1"),
        Entry((*lay, "scale2"), f"{vit}.lambda_2"),
    ]


def _vision_norms(c: VisionConfig, attention: str) -> list[Entry]:
    norms = [Entry(("vision", "layers", f"{x}_norm", "scale"), f"{attention}.{x}_norm.weight") for x in "qk"]
    return norms if c.qk_norm else []


def _decoder(c: DecoderConfig, llm: str) -> list[Entry]:
    own = _internlm2(c, llm) if c.family == "internlm2" else _llama_like(c, llm)
    return [*own, *_norm(("decoder", "norm"), f"{llm}.norm", bias=False)]


def _qkv_sizes(c: DecoderConfig) -> list[tuple[str, int]]:
    kv = c.num_kv_heads * c.head_width
    return [("q", c.num_heads * c.head_width), ("k", kv), ("v", kv)]


def _internlm2(c: DecoderConfig, llm: str) -> list[Entry]:
    """`wqkv` holds, for each key/value head, its query heads, then the key head, then the value head."""
    lay, layer = ("decoder", "layers"), f"{llm}.layers.{{}}"
    return [
        Entry(("decoder", "embedding"), f"{llm}.tok_embeddings.weight"),
        *_packed(lay, _qkv_sizes(c), f"{layer}.attention.wqkv", bias=c.qkv_bias, groups=c.num_kv_heads),
        *_linear((*lay, "o"), f"{layer}.attention.wo", bias=c.o_bias),
        *_norm((*lay, "norm1"), f"{layer}.attention_norm", bias=False),
        *_norm((*lay, "norm2"), f"{layer}.ffn_norm", bias=False),
        *_linear((*lay, "gate"), f"{layer}.feed_forward.w1", bias=False),
        *_linear((*lay, "up"), f"{layer}.feed_forward.w3", bias=False),
        *_linear((*lay, "down"), f"{layer}.feed_forward.w2", bias=False),
    ]


def _llama_like(c: DecoderConfig, llm: str) -> list[Entry]:
    lay, layer = ("decoder", "layers"), f"{llm}.layers.{{}}"
    if c.family == "phi3":
        qkv = _packed(lay, _qkv_sizes(c), f"{layer}.self_attn.qkv_proj", bias=c.qkv_bias)
        mlp = _packed(lay, [("gate", c.mlp_width), ("up", c.mlp_width)], f"{layer}.mlp.gate_up_proj", bias=False)
    else:
        qkv = [e for x in "qkv" for e in _linear((*lay, x), f"{layer}.self_attn.{x}_proj", bias=c.qkv_bias)]
        mlp = [e for x in ("gate", "up") for e in _linear((*lay, x), f"{layer}.mlp.{x}_proj", bias=False)]
    norms = [Entry((*lay, f"{x}_norm", "scale"), f"{layer}.self_attn.{x}_norm.weight") for x in "qk"]
    return [
        Entry(("decoder", "embedding"), f"{llm}.embed_tokens.weight"),
        *qkv,
        *(norms if c.qk_norm else []),
        *_linear((*lay, "o"), f"{layer}.self_attn.o_proj", bias=c.o_bias),
        *_norm((*lay, "norm1"), f"{layer}.input_layernorm", bias=False),
        *_norm((*lay, "norm2"), f"{layer}.post_attention_layernorm", bias=False),
        *mlp,
        *_linear((*lay, "down"), f"{layer}.mlp.down_proj", bias=False),
    ]
