"""The published InternVL2 models, for planning memory and meshes without their checkpoints.

Values are those of each repository's `config.json` on the Hugging Face hub. A checkpoint's own file is what counts when
it is loaded; it also brings Phi-3's 48 long and short RoPE factors, on which no shape depends.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmrm_jax.config import DecoderConfig, DynamicRope, ModelConfig, VisionConfig

VIT_300M = VisionConfig()
VIT_6B = VisionConfig(
    width=3200, mlp_width=12800, num_layers=45, num_heads=25, norm="rms_norm", qkv_bias=False, qk_norm=True
)


def _internlm2(width: int, mlp_width: int, num_layers: int, num_heads: int, factor: float) -> DecoderConfig:
    return DecoderConfig(
        family="internlm2",
        vocab_size=92553,
        width=width,
        mlp_width=mlp_width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_width=128,
        rope_scaling=DynamicRope(factor, 32768),
        norm_eps=1e-5,
        qkv_bias=False,
    )


PHI3_MINI = DecoderConfig(
    family="phi3",
    vocab_size=32020,
    width=3072,
    mlp_width=8192,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_width=96,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
)

INTERNVL2: Mapping[str, ModelConfig] = {
    "1B": ModelConfig(VIT_300M, DecoderConfig()),  # Qwen2-0.5B
    "2B": ModelConfig(VIT_300M, _internlm2(2048, 8192, 24, 16, 2.0)),  # InternLM2-1.8B
    "4B": ModelConfig(VIT_300M, PHI3_MINI),
    "8B": ModelConfig(VIT_300M, _internlm2(4096, 14336, 32, 32, 2.0)),  # InternLM2.5-7B
    "26B": ModelConfig(VIT_6B, _internlm2(6144, 16384, 48, 48, 3.0)),  # InternLM2-20B
}
