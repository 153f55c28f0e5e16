"""Every field of a `config.json`, with values it cannot have: an error that names it, and never a crash."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_models import MODEL

from mmrm_jax.models.hf import config as hf_config
from mmrm_jax.models.hf import decoder_config
from mmrm_jax.models.hf.config import config_to_hf, config_to_native, read_config
from mmrm_jax.models.hf.fields import FIELDS

HOSTILE = (
    0,
    -1,
    7,
    0.5,
    -0.5,
    1e308,
    -1e308,
    10**30,
    math.nan,
    math.inf,
    "x",
    "false",
    "8",
    True,
    False,
    [],
    [1, 2],
    {},
)
ROPES = {
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 2.0],
        "long_factor": [1.0, 2.0],
        "factor": 64.0,
        "attention_factor": 1.5811388300841895,
        "original_max_position_embeddings": 16,
    },
}


def chat() -> dict:
    hf = config_to_hf(MODEL, template="chatml-plain", max_tiles=6)
    hf["llm_config"] |= {"max_position_embeddings": 1024, "sliding_window": 2048, "use_sliding_window": True}
    hf["llm_config"] |= {"head_dim": 4, "rope_parameters": None, "architectures": ["Qwen2ForCausalLM"]}
    return hf


def native() -> dict:
    return config_to_native(MODEL, image_token_id=3)


CONFIGS = {"chat": chat(), "native": native()}
for kind, rope in ROPES.items():
    CONFIGS[kind] = chat()
    CONFIGS[kind]["llm_config"]["rope_scaling"] = rope
CONFIGS["rope_parameters"] = native()
CONFIGS["rope_parameters"]["text_config"]["rope_parameters"] = {"rope_theta": 1e4, **ROPES["llama3"]}


def places(section: dict, *above: str) -> list[tuple[str, ...]]:
    """The path of every field, sections themselves among them."""
    found = []
    for name, value in section.items():
        found += [(*above, name), *(places(value, *above, name) if isinstance(value, dict) else [])]
    return found


def replaced(config: dict, place: tuple[str, ...], value: Any) -> dict:
    whole = section = copy.deepcopy(config)
    for name in place[:-1]:
        section = section[name]
    section[place[-1]] = value
    return whole


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_value_crashes_the_reader(kind: str, tmp_path: Path) -> None:
    """And what the table of fields excludes is refused by its name."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[kind]))
    read_config(tmp_path)
    refused = 0
    for place in places(CONFIGS[kind]):
        for value in (*HOSTILE, None):
            file.write_text(json.dumps(replaced(CONFIGS[kind], place, value)))
            name = place[-1]
            try:
                assert read_config(tmp_path).visual_tokens_per_tile > 0
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"{file}: ")
                if name in FIELDS and not FIELDS[name].holds(value) and not isinstance(value, list):
                    assert f"{'.'.join(place)} is" in str(error), (place, value)
            else:
                assert name not in FIELDS or FIELDS[name].holds(value) or (name == "vision_config" and not value)
    assert refused > 200


def test_every_field_that_is_read_is_checked() -> None:
    """By its type and range, or by being one of few values."""
    tables = [hf_config._CHAT, hf_config._CHAT_VISION, hf_config._NATIVE, hf_config._NATIVE_VISION]
    tables += [family.defaults for family in decoder_config.FAMILIES.values()]
    exact = {*hf_config._REQUIRED, *hf_config._CHOICES, *decoder_config._REQUIRED}
    for table in tables:
        assert table.keys() <= FIELDS.keys() | exact
        for name in table.keys() & FIELDS.keys():
            assert FIELDS[name].holds(table[name]), name


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("llm_config.num_attention_heads", 0, "num_attention_heads is 0; supported: an integer from 1 to 4096"),
        ("llm_config.hidden_size", "16", "llm_config.hidden_size is '16'; supported: an integer"),
        ("llm_config.rms_norm_eps", "x", "llm_config.rms_norm_eps is 'x'; supported: a number from 0 to 1"),
        ("llm_config.num_hidden_layers", 400_000, "num_hidden_layers is 400000; supported: an integer from 1 to 1000"),
        ("llm_config.num_key_value_heads", 3, "num_attention_heads is 4, not a multiple of num_key_value_heads 3"),
        ("llm_config.head_dim", 5, "llm_config.head_dim is 5; supported: even"),
        ("llm_config.architectures", "Qwen2ForCausalLM", "architectures is 'Qwen2ForCausalLM'; supported: a list"),
        ("vision_config.patch_size", 0, "vision_config.patch_size is 0"),
        ("vision_config.intermediate_size", -4, "vision_config.intermediate_size is -4"),
        ("vision_config.drop_path_rate", -1, "vision_config.drop_path_rate is -1; supported: a number from 0 to 0.99"),
        ("vision_config.qkv_bias", "false", "vision_config.qkv_bias is 'false'; supported: true or false"),
        ("downsample_ratio", 0, "downsample_ratio is 0; supported: a number from 0.01 to 1"),
        ("select_layer", None, "select_layer is None; supported: an integer"),
        ("llm_config", "x" * 1000, r"llm_config is 'x{79}; supported: an object$"),
    ],
)
def test_what_is_wrong_is_named(place: str, value: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(replaced(CONFIGS["chat"], tuple(place.split(".")), value)))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", "null", '"x"', "{}", "\ud800"])
def test_what_is_no_configuration_is_a_value_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="config.json: "):
        read_config(tmp_path)
