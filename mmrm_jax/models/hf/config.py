"""`config.json` of the InternVL chat layout <-> ModelConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmrm_jax.config import DecoderConfig, ModelConfig, VisionConfig

ARCHITECTURES = {"Qwen2ForCausalLM": True, "LlamaForCausalLM": False}  # -> whether q, k, v have biases


def read_config(path: Path) -> ModelConfig:
    """The model configuration of a checkpoint folder.

    Raises ValueError naming the field for an architecture or option that is not supported, and for a missing field.
    """
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: {path} is not a checkpoint folder in the Hugging Face layout")
    try:
        return config_from_hf(json.loads(file.read_text()))
    except KeyError as error:
        raise ValueError(f"{file}: field {error} is missing") from error
    except (TypeError, IndexError) as error:
        raise ValueError(f"{file} is not an InternVL configuration: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Raises KeyError for a missing field, ValueError for an unsupported value."""
    vision, llm = hf["vision_config"], hf["llm_config"]
    architecture = llm["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"llm_config.architectures is {architecture}; supported: {', '.join(ARCHITECTURES)}")
    if llm.get("rope_scaling"):
        raise ValueError(f"llm_config.rope_scaling {llm['rope_scaling']} is not supported")
    forced = hf.get("force_image_size")
    if forced is not None and forced != vision["image_size"]:
        raise ValueError(
            f"force_image_size is {forced}, vision_config.image_size {vision['image_size']}: they must be equal, since "
            "position embeddings are not interpolated"
        )
    heads = llm["num_attention_heads"]
    return ModelConfig(
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            mlp_width=vision["intermediate_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            norm=vision["norm_type"],
            norm_eps=vision["layer_norm_eps"],
            qkv_bias=vision["qkv_bias"],
            qk_norm=vision["qk_normalization"],
        ),
        decoder=DecoderConfig(
            vocab_size=llm["vocab_size"],
            width=llm["hidden_size"],
            mlp_width=llm["intermediate_size"],
            num_layers=llm["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=llm["num_key_value_heads"],
            head_width=llm.get("head_dim") or llm["hidden_size"] // heads,
            rope_theta=llm["rope_theta"],
            norm_eps=llm["rms_norm_eps"],
            qkv_bias=ARCHITECTURES[architecture],
        ),
        downsample_ratio=hf["downsample_ratio"],
        pixel_shuffle=hf["ps_version"],
        select_layer=hf["select_layer"],
    )


def config_to_hf(config: ModelConfig, *, template: str, max_tiles: int, use_thumbnail: bool = True) -> dict[str, Any]:
    """The `config.json` of a model, as `config_from_hf` and the InternVL chat code read it."""
    v, d = config.vision, config.decoder
    return {
        "architectures": ["InternVLRewardModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": v.image_size,
        "max_dynamic_patch": max_tiles,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": config.pixel_shuffle,
        "select_layer": config.select_layer,
        "template": template,
        "torch_dtype": "float32",
        "use_thumbnail": use_thumbnail,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM" if d.qkv_bias else "LlamaForCausalLM"],
            "model_type": "qwen2" if d.qkv_bias else "llama",
            "hidden_act": "silu",
            "hidden_size": d.width,
            "intermediate_size": d.mlp_width,
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.norm_eps,
            "rope_theta": d.rope_theta,
            "tie_word_embeddings": True,
            "vocab_size": d.vocab_size,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": 0.0,
            "hidden_act": "gelu",
            "hidden_size": v.width,
            "image_size": v.image_size,
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
