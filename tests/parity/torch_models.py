"""Tiny random InternVL models of transformers, and the same input for them and for mmrm_jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from flax import nnx
from safetensors.torch import save_file
from tiny_models import random_params
from transformers import InternVLConfig, InternVLForConditionalGeneration

from mmrm_jax.config import ModelConfig
from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.data.text import Conversation
from mmrm_jax.models.hf.config import read_config
from mmrm_jax.models.hf.weights import load_params

IMAGE_TOKEN = 20
TEXT = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": [8, 8],
    "patch_size": [2, 2],
    "attention_bias": True,
}
RMS = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
# Conversations of 17 to 24 tokens: shorter and longer than where dynamic NTK and LongRoPE change.
LONG = {"max_position_embeddings": 64, "original_max_position_embeddings": 20, "rope_parameters": LONGROPE}
SHORT = LONG | {"original_max_position_embeddings": 32}


def dynamic(length: int) -> dict[str, Any]:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return {"max_position_embeddings": length, "rope_parameters": rope}


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
# name -> (text_config, vision_config, the rest). Vision layer 0 is one that transformers itself fails on.
MODELS: Mapping[str, tuple[dict, dict, dict]] = {
    "qwen2": ({"model_type": "qwen2"}, {}, {}),
    "qwen2 linear": ({"model_type": "qwen2", **LINEAR}, RMS, {"vision_feature_layer": -2}),
    "qwen2 dynamic": ({"model_type": "qwen2", **dynamic(20)}, {}, {"vision_feature_layer": 1}),
    "qwen2 dynamic, not reached": ({"model_type": "qwen2", **dynamic(32)}, {"use_qk_norm": True}, {}),
    "qwen3": ({"model_type": "qwen3", "head_dim": 8}, RMS, {}),
    "qwen3 with biases": ({"model_type": "qwen3", "head_dim": 6, "attention_bias": True}, {}, {}),
    "llama": ({"model_type": "llama"}, {"attention_bias": False}, {"vision_feature_layer": 2}),
    "llama with biases": ({"model_type": "llama", "attention_bias": True, **LINEAR}, {"norm_type": "rms_norm"}, {}),
    "llama llama3": ({"model_type": "llama", "rope_parameters": LLAMA3, "num_key_value_heads": 1}, {}, {}),
    "phi3": ({"model_type": "phi3"}, {}, {}),
    "phi3 longrope": ({"model_type": "phi3", **LONG}, RMS, {"vision_feature_layer": -3}),
    "phi3 longrope, short": ({"model_type": "phi3", **SHORT}, {}, {}),
}
FAMILIES = ("qwen2", "qwen3", "llama with biases", "phi3 longrope")


def make_model(
    name: str,
    *,
    tied: bool = True,
    text: Mapping[str, Any] = MappingProxyType({}),
    vision: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> InternVLForConditionalGeneration:
    """Random in every parameter: biases are initialised as 0 and scales as 1, which would hide what is left out."""
    own_text, own_vision, rest = MODELS[name]
    config = InternVLConfig(
        vision_config={**VISION, **own_vision, **vision},
        text_config={**TEXT, **own_text, **text, "tie_word_embeddings": tied},
        **{"image_seq_length": 4, "image_token_id": IMAGE_TOKEN, "tie_word_embeddings": tied, **rest, **fields},
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            spread = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3
            p.copy_(spread * torch.randn_like(p) + (1.0 if p.ndim == 1 and bool((p == 1).all()) else 0.0))
        model.get_input_embeddings().weight.normal_()
    return model


def save_state_dict(model: InternVLForConditionalGeneration, folder: Path) -> None:
    """As a training loop of its own saves: the names are not those that `save_pretrained` gives the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.clone().contiguous() for name, x in model.state_dict().items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)


def read_model(folder: Path) -> tuple[ModelConfig, nnx.State]:
    """What mmrm_jax makes of a folder; the score head, which transformers has not, is random."""
    config = read_config(folder)
    params, drawn = load_params(folder, config, random_params(config, 5))
    assert drawn == ["score"]
    return config, params


def random_conversations(
    config: ModelConfig, *, tiles: int, lengths: Sequence[int], prefix: int = 8, seed: int = 0
) -> EncodedGroup:
    """A prefix of `prefix` text tokens around an image of `tiles` tiles, and responses of these lengths."""
    rng = np.random.default_rng(seed)
    slots = tiles * config.visual_tokens_per_tile
    tokens = rng.integers(2, IMAGE_TOKEN, size=prefix + slots).astype(np.int32)
    tokens[2 : 2 + slots] = IMAGE_TOKEN
    visual = np.full(len(tokens), -1, np.int32)
    visual[2 : 2 + slots] = np.arange(slots)
    responses = tuple(rng.integers(2, IMAGE_TOKEN, size=n).astype(np.int32) for n in lengths)
    side = config.vision.image_size
    pixels = rng.integers(256, size=(tiles, side, side, 3)).astype(np.uint8) if tiles else None
    return EncodedGroup(0, {"primary": Conversation(tokens, visual)}, responses, pixels, ())


def torch_pixels(pixels: np.ndarray, config: ModelConfig) -> torch.Tensor:
    """[T, 3, h, w], normalised as mmrm_jax does inside its model."""
    mean, std = (np.asarray(x, np.float32) for x in (config.vision.mean, config.vision.std))
    return torch.tensor(((pixels.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def torch_hidden(
    model: InternVLForConditionalGeneration, group: EncodedGroup, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(last hidden states [N, S, D], lengths [N]): every conversation whole, padded on the right to the longest."""
    prefix = group.prefixes["primary"].tokens
    whole = [np.concatenate([prefix, r]) for r in group.responses]
    lengths = torch.tensor([len(w) for w in whole])
    longest = max(map(len, whole))
    ids = torch.tensor(np.stack([np.pad(w, (0, longest - len(w))) for w in whole]), dtype=torch.long)
    inputs: dict[str, torch.Tensor] = {}
    if group.tiles is not None:
        pixels = torch_pixels(group.tiles, config).to(model.dtype)
        inputs["pixel_values"] = pixels.repeat(len(whole), 1, 1, 1)
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return model.model(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state, lengths


def relative_error(got: Any, want: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    a, b = np.asarray(got, np.float64), want.detach().numpy().astype(np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())
