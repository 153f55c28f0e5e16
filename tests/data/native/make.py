"""Writes the folders beside this file: tiny random transformers InternVL models and what they compute.

    python tests/data/native/make.py

Made with torch 2.13.0 and transformers 5.23.0; neither is needed to run the tests.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

IMAGE_TOKEN = 20
TEXT = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
MODELS = {
    "qwen2_dynamic": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        },
        {"attention_bias": True},
    ),
    "qwen3": ({"model_type": "qwen3", "head_dim": 8}, {"use_qk_norm": True, "norm_type": "rms_norm"}),
    "llama_llama3": ({"model_type": "llama", "rope_parameters": LLAMA3}, {"attention_bias": True}),
    "phi3_longrope": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 32,
            "original_max_position_embeddings": 8,
            "rope_parameters": LONGROPE,
        },
        {"attention_bias": True},
    ),
}


def make(folder: Path, text: dict, vision: dict) -> None:
    config = InternVLConfig(
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "image_size": [8, 8],
            "patch_size": [2, 2],
            **vision,
        },
        text_config={**TEXT, **text},
        image_seq_length=4,
        image_token_id=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():  # so that no bias is 0, no scale 1
            p.copy_(0.3 * torch.randn_like(p) + (1.0 if p.ndim == 1 and bool((p == 1).all()) else 0.0))
    ids = torch.tensor([[1, 2, *[IMAGE_TOKEN] * 4, 5, 6, 7, 8, 9, 3]])
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    arrays = {"input_ids": ids, "pixel_values": pixels, "last_hidden": hidden}
    np.savez(folder / "outputs.npz", **{k: v.numpy() for k, v in arrays.items()})
    names = "".join(f"{name}\n" for name in sorted(model.state_dict()))
    (folder / "state_dict.txt").write_text(names)


for name, (text, vision) in MODELS.items():
    make(Path(__file__).parent / name, text, vision)
