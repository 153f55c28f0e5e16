"""`config.json` <-> ModelConfig, in the InternVL chat layout and in that of transformers' own InternVL ("-hf")."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrm_jax.config import DecoderConfig, LongRope, ModelConfig, VisionConfig
from mmrm_jax.models.hf.decoder_config import decoder_from_hf, decoder_to_hf
from mmrm_jax.models.hf.fields import checked

# What the configuration classes assume where a field is absent.
_CHAT = {"downsample_ratio": 0.5, "ps_version": "v1", "select_layer": -1, "force_image_size": None}
_CHAT_VISION = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
}
_NATIVE = {
    "downsample_ratio": 0.5,
    "image_seq_length": 256,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}
_NATIVE_VISION = {
    "image_size": 448,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "attention_bias": False,
    "use_qk_norm": False,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
    "hidden_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "projection_dropout": 0.0,
}

# Fields whose other values this implementation does not compute.
_REQUIRED = {
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "num_channels": 3,
    "hidden_act": "gelu",
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
    "dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "projection_dropout": 0.0,
}
_CHOICES = {"ps_version": ("v1", "v2"), "norm_type": ("layer_norm", "rms_norm")}


def read_config(path: Path) -> ModelConfig:
    """The model configuration of a checkpoint folder.

    Raises ValueError naming the field for an architecture or option that is not supported, a value that cannot be, and
    a missing field.
    """
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: {path} is not a checkpoint folder in the Hugging Face layout")
    try:
        return config_from_hf(json.loads(file.read_text(encoding="utf-8")))
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def config_from_hf(hf: Any) -> ModelConfig:
    """Either layout; a field that is absent has its configuration class's default.

    Raises KeyError for a field without one, ValueError naming a field with an unsupported value.
    """
    fields = checked(hf, "", {})
    return _from_native(fields) if "text_config" in fields else _from_chat(fields)


def _with_defaults(section: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = checked(section, where, defaults)
    for name in defaults:
        if name in _REQUIRED and fields[name] != _REQUIRED[name]:
            raise ValueError(f"{where}{name} is {fields[name]!r}; supported: {_REQUIRED[name]!r}")
        if name in _CHOICES and fields[name] not in _CHOICES[name]:
            raise ValueError(f"{where}{name} is {fields[name]!r}; supported: {', '.join(_CHOICES[name])}")
    return fields


def _from_chat(hf: Mapping[str, Any]) -> ModelConfig:
    v = _with_defaults(hf["vision_config"], _CHAT_VISION, "vision_config.")
    c = _with_defaults(hf, _CHAT, "")
    forced = c["force_image_size"] or v["image_size"]
    vision = VisionConfig(
        image_size=forced,
        patch_size=v["patch_size"],
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        num_layers=v["num_hidden_layers"],
        num_heads=v["num_attention_heads"],
        norm=v["norm_type"],
        norm_eps=v["layer_norm_eps"],
        qkv_bias=v["qkv_bias"],
        qk_norm=v["qk_normalization"],
        position_image_size=None if forced == v["image_size"] else v["image_size"],
        drop_path_rate=v["drop_path_rate"],
    )
    decoder = decoder_from_hf(hf["llm_config"], "llm_config")
    size = "vision_config.image_size" if c["force_image_size"] is None else "force_image_size"
    return _model(vision, decoder, c["downsample_ratio"], c["ps_version"], c["select_layer"], size)


def _from_native(hf: Mapping[str, Any]) -> ModelConfig:
    v = _with_defaults(_squares(hf.get("vision_config") or {}), _NATIVE_VISION, "vision_config.")
    c = _with_defaults(hf, _NATIVE, "")
    if v["use_qk_norm"] and v["layer_norm_eps"] != 1e-6:
        raise ValueError(f"vision_config.layer_norm_eps is {v['layer_norm_eps']}; with use_qk_norm supported: 1e-06")
    vision = VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        num_layers=v["num_hidden_layers"],
        num_heads=v["num_attention_heads"],
        norm=v["norm_type"],
        norm_eps=v["layer_norm_eps"],
        qkv_bias=v["attention_bias"],
        qk_norm=v["use_qk_norm"],
    )
    decoder = decoder_from_hf({"model_type": "qwen2", **hf["text_config"]}, "text_config")
    layer = c["vision_feature_layer"]
    config = _model(vision, decoder, c["downsample_ratio"], "v2", layer, "vision_config.image_size")
    if c["image_seq_length"] != config.visual_tokens_per_tile:
        raise ValueError(
            f"image_seq_length is {c['image_seq_length']}, but image_size, patch_size and downsample_ratio give "
            f"{config.visual_tokens_per_tile} tokens"
        )
    return config


def _squares(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The section with one number where a size is [height, width]."""
    fields = dict(vision)
    for name in ("image_size", "patch_size"):
        match fields.get(name):
            case [height, width] if height == width:
                fields[name] = height
            case list() as size:
                raise ValueError(f"vision_config.{name} is {size!r:.80}; supported: squares")
    return fields


def _model(
    vision: VisionConfig, decoder: DecoderConfig, ratio: float, shuffle: Any, layer: int, size_field: str
) -> ModelConfig:
    if isinstance(ratio, bool) or not 0 < ratio <= 1 or not math.isclose(1 / ratio, round(1 / ratio)):
        raise ValueError(f"downsample_ratio is {ratio!r}, not one over a whole number")
    if type(layer) is not int:
        raise ValueError(f"the selected vision layer is {layer!r}, not an integer")
    for name, size in ((size_field, vision.image_size), ("vision_config.image_size", vision.position_image_size)):
        if size is not None and size % vision.patch_size:
            raise ValueError(f"{name} is {size}, not a multiple of vision_config.patch_size {vision.patch_size}")
    if vision.width % vision.num_heads:
        raise ValueError(f"vision_config.hidden_size is {vision.width}, not a multiple of {vision.num_heads} heads")
    merged = vision.image_size // vision.patch_size * ratio
    if not math.isclose(merged, round(merged)):
        raise ValueError(f"downsample_ratio is {ratio}: it does not divide a tile into whole visual tokens")
    if not -vision.num_layers - 1 <= layer <= vision.num_layers:
        raise ValueError(f"the selected vision layer is {layer}, but there are {vision.num_layers} layers")
    return ModelConfig(vision, decoder, ratio, shuffle, layer)


def config_to_hf(
    config: ModelConfig,
    *,
    template: str,
    max_tiles: int,
    min_tiles: int = 1,
    use_thumbnail: bool = True,
    dynamic: bool = True,
) -> dict[str, Any]:
    """The `config.json` of a model in the InternVL chat layout, as `config_from_hf` and the chat code read it.

    Raises ValueError for a decoder that its family's configuration cannot express.
    """
    v = config.vision
    return {
        "architectures": ["InternVLRewardModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": dynamic,
        "force_image_size": v.image_size,
        "max_dynamic_patch": max_tiles,
        "min_dynamic_patch": min_tiles,
        "pad2square": False,
        "ps_version": config.pixel_shuffle,
        "select_layer": config.select_layer,
        "template": template,
        "torch_dtype": "float32",
        "use_thumbnail": use_thumbnail,
        "llm_config": decoder_to_hf(config.decoder),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": v.drop_path_rate,
            "hidden_act": "gelu",
            "hidden_size": v.width,
            "image_size": v.position_image_size or v.image_size,
            "intermediate_size": v.mlp_width,
            "layer_norm_eps": v.norm_eps,
            "norm_type": v.norm,
            "num_attention_heads": v.num_heads,
            "num_hidden_layers": v.num_layers,
            "patch_size": v.patch_size,
            "qk_normalization": v.qk_norm,
            "qkv_bias": v.qkv_bias,
        },
    }


def _not_native(config: ModelConfig) -> str | None:
    """What of a model the layout of transformers' InternVL has no form for, if anything."""
    rope, resized = config.decoder.rope_scaling, config.vision.position_image_size
    if config.decoder.family == "internlm2":
        return "an InternLM2 decoder"
    if isinstance(rope, LongRope) and rope.kind != "su":
        return f"a RoPE scaling of type {rope.kind}"
    if config.pixel_shuffle != "v2":
        return f"pixel shuffle {config.pixel_shuffle} (ps_version)"
    if resized is not None:
        return f"position embeddings of {resized} pixels resized for tiles of {config.vision.image_size}"
    return None


def config_to_native(config: ModelConfig, *, image_token_id: int) -> dict[str, Any]:
    """The `config.json` of a model in the layout of transformers' `InternVLForConditionalGeneration`.

    That layout cannot hold a drop path rate: it is left out. Raises ValueError for what its code does not compute.
    """
    v, text, rope = config.vision, decoder_to_hf(config.decoder), config.decoder.rope_scaling
    if found := _not_native(config):
        raise ValueError(f"transformers' own InternVL layout cannot hold {found}; use the chat layout (--layout chat)")
    text["pad_token_id"] = None  # no token is padding here; Phi-3's default is one that a small vocabulary has not
    if isinstance(rope, LongRope):  # by another name than in Phi-3's own code, which allows no further fields
        text["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
            "original_max_position_embeddings": rope.original_length,
        }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": config.downsample_ratio,
        "image_seq_length": config.visual_tokens_per_tile,
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": True,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": v.qkv_bias,
            "hidden_act": "gelu",
            "hidden_size": v.width,
            "image_size": [v.image_size, v.image_size],
            "intermediate_size": v.mlp_width,
            "layer_norm_eps": v.norm_eps,
            "norm_type": v.norm,
            "num_attention_heads": v.num_heads,
            "num_hidden_layers": v.num_layers,
            "patch_size": [v.patch_size, v.patch_size],
            "use_mean_pooling": True,
            "use_qk_norm": v.qk_norm,
        },
    }
