"""The language model's part of a `config.json` <-> DecoderConfig, for every decoder family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmrm_jax.config import (
    DecoderConfig,
    DecoderFamily,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeScaling,
)
from mmrm_jax.models.hf.fields import FIELDS, checked


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face architecture: what its configuration class assumes where a field is absent, and its biases.

    `bias` is the field that turns on biases of the `biased` projections, or says that they always (True) or never
    (False) have them.
    """

    architecture: str
    defaults: Mapping[str, Any]
    bias: str | bool
    biased: str = "qkvo"
    qk_norm: bool = False


# Common to all; each family's own values follow.
_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
_QWEN = _DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_LLAMA = _DEFAULTS | {"vocab_size": 32000, "intermediate_size": 11008, "attention_bias": False}
_PHI3 = _DEFAULTS | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

FAMILIES: Mapping[DecoderFamily, Family] = {
    "internlm2": Family(
        "InternLM2ForCausalLM",
        _DEFAULTS | {"vocab_size": 103168, "intermediate_size": 11008, "bias": True},
        bias="bias",
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, bias=True, biased="qkv"),
    "qwen3": Family(
        "Qwen3ForCausalLM", _QWEN | {"head_dim": 128, "attention_bias": False}, bias="attention_bias", qk_norm=True
    ),
    "llama": Family("LlamaForCausalLM", _LLAMA, bias="attention_bias"),
    "phi3": Family("Phi3ForCausalLM", _PHI3, bias=False),
}

# Fields whose other values this implementation does not compute.
_REQUIRED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}


def find_family(llm: Mapping[str, Any], where: str) -> DecoderFamily:
    """By `architectures`, or `model_type` where there are none. Raises ValueError for an unsupported one."""
    architectures = llm.get("architectures")
    if architectures:
        if not isinstance(architectures, list):
            raise ValueError(f"{where}.architectures is {architectures!r:.80}; supported: a list of names")
        for name, family in FAMILIES.items():
            if architectures[0] == family.architecture:
                return name
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise ValueError(f"{where}.architectures is {architectures[0]}; supported: {known}")
    for name in FAMILIES:
        if llm["model_type"] == name:
            return name
    raise ValueError(f"{where}.model_type is {llm['model_type']}; supported: {', '.join(FAMILIES)}")


def decoder_from_hf(llm: Mapping[str, Any], where: str) -> DecoderConfig:
    """`where` is the section's name, for messages. Raises ValueError naming a field with an unsupported value."""
    name = find_family(llm, where)
    family = FAMILIES[name]
    c = checked(llm, f"{where}.", family.defaults)
    for field, want in _REQUIRED.items():
        if c[field] != want:
            raise ValueError(f"{where}.{field} is {c[field]!r}; supported: {want!r}")
    window = c["sliding_window"] if c.get("use_sliding_window", True) else None
    if window is not None and window < c["max_position_embeddings"]:
        raise ValueError(
            f"{where}.sliding_window is {window}, shorter than max_position_embeddings {c['max_position_embeddings']}: "
            "attention within a window is not supported"
        )
    heads = c["num_attention_heads"]
    kv_heads = c["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise ValueError(f"{where}.num_attention_heads is {heads}, not a multiple of num_key_value_heads {kv_heads}")
    if c["head_dim"] is None and c["hidden_size"] % heads:
        raise ValueError(f"{where}.hidden_size is {c['hidden_size']}, not a multiple of num_attention_heads {heads}")
    head_width = c["head_dim"] or c["hidden_size"] // heads
    if head_width % 2:
        raise ValueError(f"{where}.head_dim is {head_width}; supported: even numbers, which RoPE turns in pairs")
    bias = c[family.bias] if isinstance(family.bias, str) else family.bias
    return DecoderConfig(
        family=name,
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        mlp_width=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=head_width,
        rope_theta=float(_rope_section(c, where)[1].get("rope_theta", c["rope_theta"])),
        rope_scaling=_rope_from_hf(name, c, where),
        norm_eps=c["rms_norm_eps"],
        qkv_bias=bias,
        o_bias=bias and "o" in family.biased,
        qk_norm=family.qk_norm,
    )


def _rope_section(c: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of the section on RoPE; what it leaves open is as good as absent.

    transformers 5 writes `rope_parameters`, with the base in it, and takes `rope_scaling` for another name of that;
    before, there were `rope_theta` and `rope_scaling`.
    """
    field = "rope_parameters" if c["rope_parameters"] else "rope_scaling"
    section = checked(c[field] or {}, f"{where}.{field}.", {})
    return field, {k: v for k, v in section.items() if v is not None}


def _rope_from_hf(name: DecoderFamily, c: Mapping[str, Any], where: str) -> RopeScaling | None:
    field, scaling = _rope_section(c, where)
    if nested := [k for k, v in scaling.items() if isinstance(v, dict) and k not in FIELDS]:
        raise ValueError(f"{where}.{field} has its own settings for {', '.join(nested)}; supported: one for all layers")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}.{field}.partial_rotary_factor is {scaling['partial_rotary_factor']}; supported: 1.0")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(float(scaling["factor"]))
    if kind == "dynamic":
        return DynamicRope(float(scaling["factor"]), c["max_position_embeddings"])
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        if low >= high:
            raise ValueError(f"{where}.{field}.low_freq_factor is {low}, not below high_freq_factor {high}")
        return Llama3Rope(float(scaling["factor"]), low, high, scaling["original_max_position_embeddings"])
    if kind in ("su", "longrope") or (kind == "yarn" and name == "phi3"):
        return _longrope_from_hf(kind, scaling, c, f"{where}.{field}")
    raise ValueError(
        f"{where}.{field} has the type {kind!r}; supported: default, linear, dynamic, llama3, su, longrope"
    )


def _longrope_from_hf(kind: str, scaling: Mapping[str, Any], c: Mapping[str, Any], where: str) -> LongRope:
    pairs = (c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]) // 2
    for field in ("short_factor", "long_factor"):
        if len(scaling[field]) != pairs:
            raise ValueError(f"{where}.{field} has {len(scaling[field])} entries, a head has {pairs} pairs of channels")
    original = c.get("original_max_position_embeddings") or scaling["original_max_position_embeddings"]
    rope = LongRope(
        tuple(map(float, scaling["short_factor"])),
        tuple(map(float, scaling["long_factor"])),
        original,
        c["max_position_embeddings"],
        "yarn" if kind == "yarn" else "su",
    )
    longer = rope.max_length / rope.original_length
    for field, want in (("attention_factor", rope.scale), ("factor", longer)):
        given = scaling.get(field)
        if given is not None and abs(given - want) > 1e-6 * want:
            raise ValueError(f"{where}.{field} is {given}; supported: {want}, which follows from the two lengths")
    return rope


def decoder_to_hf(d: DecoderConfig) -> dict[str, Any]:
    """The inverse of `decoder_from_hf`. Raises ValueError for options that the family's code does not have."""
    family = FAMILIES[d.family]
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": d.family,
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
        **_rope_to_hf(d.rope_scaling),
    }
    if isinstance(family.bias, str):
        hf[family.bias] = d.qkv_bias
    if d.head_width != d.width // d.num_heads or family.defaults["head_dim"]:
        hf["head_dim"] = d.head_width
    back = decoder_from_hf(hf, "llm_config")
    if back != d:
        fields = [f.name for f in dataclasses.fields(d) if getattr(back, f.name) != getattr(d, f.name)]
        raise ValueError(f"{family.architecture} cannot have this decoder's {', '.join(fields)}")
    return hf


def _rope_to_hf(rope: RopeScaling | None) -> dict[str, Any]:
    match rope:
        case LinearRope(factor):
            return {"rope_scaling": {"type": "linear", "factor": factor}}
        case DynamicRope(factor, max_length):
            return {"rope_scaling": {"type": "dynamic", "factor": factor}, "max_position_embeddings": max_length}
        case Llama3Rope(factor, low, high, original):
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
            return {"rope_scaling": scaling}
        case LongRope(short, long, original, max_length, kind):
            return {
                "rope_scaling": {"type": kind, "short_factor": list(short), "long_factor": list(long)},
                "max_position_embeddings": max_length,
                "original_max_position_embeddings": original,
            }
        case _:
            return {}
