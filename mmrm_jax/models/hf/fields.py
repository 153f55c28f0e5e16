"""What the fields of a `config.json` may hold: their types, and the ranges in which a model makes sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
    """The values a field may have: of one kind, numbers (also in lists) from `low` to `high`; None where `optional`."""

    kind: type | tuple[type, ...]
    low: int | float = 0
    high: int | float = 0
    optional: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the field may have this value."""
        if value is None:
            return self.optional
        if isinstance(value, bool):
            return self.kind is bool
        if not isinstance(value, self.kind):
            return False
        if isinstance(value, list):
            return all(_number(self.low, self.high).holds(x) for x in value)
        return isinstance(value, dict) or self.low <= value <= self.high  # NaN is in no range

    def __str__(self) -> str:
        words = {bool: "true or false", dict: "an object", list: "a list of numbers, each", int: "an integer"}
        text = words.get(self.kind, "a number")
        if self.high:
            text += f" from {self.low} to {self.high}"
        return text + (" or null" if self.optional else "")


def _whole(high: int, low: int = 1, *, optional: bool = False) -> Field:
    return Field(int, low, high, optional)


def _number(low: int | float, high: int | float, *, optional: bool = False) -> Field:
    return Field((int, float), low, high, optional)


_FACTOR, _SWITCH, _SECTION = _number(0.01, 10**6), Field(bool), Field(dict, optional=True)

# By name, in whatever section they stand. The upper limits are far beyond any model, and keep a damaged or hostile
# file from making the reader itself run out of time or memory.
FIELDS: Mapping[str, Field] = {
    "hidden_size": _whole(2**16),
    "intermediate_size": _whole(2**20),
    "num_hidden_layers": _whole(1000),
    "num_attention_heads": _whole(2**12),
    "num_key_value_heads": _whole(2**12, optional=True),
    "head_dim": _whole(2**12, optional=True),
    "vocab_size": _whole(2**24),
    "image_size": _whole(4096),
    "patch_size": _whole(4096),
    "force_image_size": _whole(4096, optional=True),
    "image_seq_length": _whole(4096**2),
    "max_position_embeddings": _whole(2**30),
    "original_max_position_embeddings": _whole(2**30, 2, optional=True),  # its logarithm is divided by
    "sliding_window": _whole(2**30, optional=True),
    "select_layer": _whole(1000, -1001),
    "vision_feature_layer": _whole(1000, -1001),
    "downsample_ratio": _number(0.01, 1),
    "drop_path_rate": _number(0, 0.99),
    "layer_norm_eps": _number(0, 1),
    "rms_norm_eps": _number(0, 1),
    "rope_theta": _number(1, 10**12),
    "factor": _number(0.01, 10**6, optional=True),
    "attention_factor": _number(0.01, 10**6, optional=True),
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "short_factor": Field(list, _FACTOR.low, _FACTOR.high),
    "long_factor": Field(list, _FACTOR.low, _FACTOR.high),
    "qkv_bias": _SWITCH,
    "qk_normalization": _SWITCH,
    "use_qk_norm": _SWITCH,
    "attention_bias": _SWITCH,
    "bias": _SWITCH,
    "use_sliding_window": _SWITCH,
    "rope_scaling": _SECTION,
    "rope_parameters": _SECTION,
    "vision_config": _SECTION,
    "text_config": Field(dict),
    "llm_config": Field(dict),
}


def checked(section: Any, where: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A section with the values its class assumes for absent fields; `where` is its name and a dot, for messages.

    Raises ValueError naming the first field that has a value it cannot have.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"{where.removesuffix('.') or 'the file'} holds {section!r:.80}, not an object")
    for name, value in section.items():
        if name in FIELDS and not FIELDS[name].holds(value):
            raise ValueError(f"{where}{name} is {value!r:.80}; supported: {FIELDS[name]}")
    return {**defaults, **section}
