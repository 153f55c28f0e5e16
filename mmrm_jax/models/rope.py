"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their scaling to long conversations."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmrm_jax.config import DecoderConfig, DynamicRope, LinearRope, Llama3Rope, LongRope


def rope_frequencies(config: DecoderConfig, lengths: Int[Array, " G"]) -> Float[Array, "G_or_1 half"]:
    """Angle per position of every pair of channels, theta^(-2i/E), in float32; one row where it suits every length.

    `lengths` are true conversation lengths. Dynamic NTK and LongRoPE look at them, and at nothing else: neither padding
    nor what was computed before has an influence. Powers are rounded once, as they are in the Hugging Face code: at
    position p an error in a frequency counts p times.
    """
    c, scaling = config, config.rope_scaling
    exponents = np.arange(0, c.head_width, 2, dtype=np.float32) / np.float32(c.head_width)
    powers = (c.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    match scaling:
        case LinearRope():
            return jnp.asarray(1 / powers / np.float32(scaling.factor))[None]
        case Llama3Rope():
            return jnp.asarray(_llama3(1 / powers, scaling))[None]
        case DynamicRope():
            # Up to max_length the factor is exactly 1.
            length = jnp.maximum(lengths, scaling.max_length).astype(jnp.float32)[:, None]
            longer = scaling.factor * (length / scaling.max_length) - (scaling.factor - 1)
            growth = longer ** jnp.asarray(exponents * np.float32(c.head_width / (c.head_width - 2)))[None]
            return 1 / (jnp.asarray(powers)[None] * growth)
        case LongRope():
            short, long = (np.asarray(f, np.float32) for f in (scaling.short_factors, scaling.long_factors))
            is_long = lengths[:, None] > scaling.original_length
            return jnp.where(is_long, jnp.asarray(1 / (long * powers))[None], jnp.asarray(1 / (short * powers))[None])
        case _:
            return jnp.asarray(1 / powers)[None]


def fixed(config: DecoderConfig, max_length: int) -> bool:
    """Whether the frequencies are the same for all conversations of up to `max_length` tokens."""
    match config.rope_scaling:
        case DynamicRope(max_length=threshold) | LongRope(original_length=threshold):
            return max_length <= threshold
        case _:
            return True


def _llama3(frequency: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    """Wavelengths above original_length / low_factor are stretched, those below original_length / high_factor kept."""
    turns = scaling.original_length * frequency / (2 * np.pi)
    keep = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0, 1)
    return (keep * frequency + (1 - keep) * frequency / scaling.factor).astype(np.float32)


def rope_tables(
    config: DecoderConfig, frequencies: Float[Array, "G_or_1 half"], positions: Int[Array, "G_or_one *N S"]
) -> tuple[Float[Array, "G *N S 1 half"], Float[Array, "G *N S 1 half"]]:
    """Cosines and sines in float32, for `rotate`."""
    rows, half = frequencies.shape
    angle = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(rows, *(1,) * positions.ndim, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(config.rope_scaling, LongRope):
        cos, sin = cos * config.rope_scaling.scale, sin * config.rope_scaling.scale
    return cos, sin


def rotate(
    x: Float[Array, "*B S heads E"], tables: tuple[Float[Array, "*#B S 1 half"], Float[Array, "*#B S 1 half"]]
) -> Float[Array, "*B S heads E"]:
    """Apply rotary embeddings in the half-split layout of the Hugging Face Llama family."""
    cos, sin = tables
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
