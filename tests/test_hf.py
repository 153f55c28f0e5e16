"""Checkpoints in the Hugging Face layout: bit-exact both ways, and clear errors for what does not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import MODEL, flat, random_params

import mmrm_jax
from mmrm_jax.config import DecoderConfig, ModelConfig, VisionConfig
from mmrm_jax.models.hf.config import config_from_hf, config_to_hf, read_config
from mmrm_jax.models.hf.names import name_table
from mmrm_jax.models.hf.weights import load_params, save_params
from mmrm_jax.train.state import abstract_model, init_params

VARIANTS = {
    "qwen2, layer norm": MODEL,
    "llama, rms norm": dataclasses.replace(
        MODEL,
        vision=dataclasses.replace(MODEL.vision, norm="rms_norm", qk_norm=True, qkv_bias=False, num_layers=2),
        decoder=dataclasses.replace(MODEL.decoder, qkv_bias=False),
        pixel_shuffle="v1",
        select_layer=-2,
    ),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_params(tmp_path, MODEL, random_params(MODEL, 1))
    return tmp_path


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_round_trip_is_bit_exact(config: ModelConfig, tmp_path: Path) -> None:
    params = random_params(config, 1)
    save_params(tmp_path, config, params)
    loaded, initialised = load_params(tmp_path, config, random_params(config, 2))
    assert initialised == []
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for name, x in flat(params).items():
        np.testing.assert_array_equal(flat(loaded)[name], x, err_msg=name)
        assert flat(loaded)[name].dtype == np.float32
    first = (tmp_path / "model.safetensors").read_bytes()
    save_params(tmp_path, config, loaded)
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_has_one_name(config: ModelConfig) -> None:
    table = name_table(config)
    assert {"/".join(e.path) for e in table} == flat(abstract_model(config)[1]).keys()
    assert len({e.name for e in table}) == len({e.path for e in table}) == len(table)


def test_layouts_are_those_of_torch(checkpoint: Path) -> None:
    tensors, params = load_file(checkpoint / "model.safetensors"), flat(random_params(MODEL, 1))
    # nn.Linear keeps [out, in]; layer 1 is a slice of the stack
    kernel = params["decoder/layers/k/kernel"]
    assert kernel.shape == (2, 16, 8)
    np.testing.assert_array_equal(tensors["language_model.model.layers.1.self_attn.k_proj.weight"], kernel[1].T)
    # nn.Conv2d keeps [out, channel, row, column]; our matrix runs over channel, row, column
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    assert patch.shape == (8, 3, 2, 2)
    np.testing.assert_array_equal(patch[:, 2, 1, 0], params["vision/patch/kernel"][2 * 4 + 1 * 2 + 0])
    assert tensors["score.weight"].shape == (1, 16)
    assert tensors["vision_model.embeddings.class_embedding"].shape == (1, 1, 8)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(dtype: type, checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    params, _ = load_params(checkpoint, MODEL, random_params(MODEL, 2))
    want = flat(random_params(MODEL, 1))
    for name, x in flat(params).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, np.asarray(want[name]).astype(dtype).astype(np.float32), err_msg=name)


def test_missing_score_is_initialised_and_named(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.pop("score.weight"))
    init = init_params(MODEL, 7)
    params, initialised = load_params(checkpoint, MODEL, init)
    assert initialised == ["score"]
    np.testing.assert_array_equal(flat(params)["score"], flat(init)["score"])
    np.testing.assert_array_equal(flat(params)["decoder/embedding"], flat(random_params(MODEL, 1))["decoder/embedding"])
    # N(0, 1 / (width + 1)): the standard deviation of 16 draws is within a factor of two
    assert 0.5 < np.std(flat(init)["score"]) * 17**0.5 < 2


def test_language_model_head_is_left_out(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.update({"language_model.lm_head.weight": np.zeros((32, 16), np.float32)}))
    assert load_params(checkpoint, MODEL, random_params(MODEL, 2))[1] == []


def test_everything_that_does_not_fit_is_listed_at_once(checkpoint: Path) -> None:
    def change(tensors: dict) -> None:
        del tensors["mlp1.1.bias"], tensors["language_model.model.layers.1.self_attn.q_proj.weight"]
        tensors["language_model.model.layers.2.self_attn.q_proj.weight"] = np.zeros((16, 16), np.float32)
        tensors["language_model.model.norm.weight"] = np.zeros(17, np.float32)

    edit(checkpoint, change)
    with pytest.raises(ValueError) as error:
        load_params(checkpoint, MODEL, random_params(MODEL, 2))
    assert str(error.value).split("\n  ") == [
        f"{checkpoint / 'model.safetensors'} does not fit its config.json:",
        "missing: language_model.model.layers.1.self_attn.q_proj.weight",
        "missing: mlp1.1.bias",
        "unknown: language_model.model.layers.2.self_attn.q_proj.weight",
        "shape: language_model.model.norm.weight is (17,), config.json says (16,)",
    ]


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


HOSTILE = {
    "empty": b"",
    "length beyond the file": header(b"{}", 2**63),
    "huge length": header(b"{}", 2**40),
    "no JSON": header(b"\x80\x04\x95 pickle"),
    "not an object": header(b"[1, 2]"),
    "offsets beyond the file": header(b'{"score.weight":{"dtype":"F32","shape":[1,16],"data_offsets":[0,64]}}'),
    "negative offsets": header(b'{"score.weight":{"dtype":"F32","shape":[1,16],"data_offsets":[-64,0]}}'),
    "overflowing shape": header(
        b'{"score.weight":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,64]}}' + b" " * 64
    ),
    "unknown dtype": header(b'{"score.weight":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}') + b"0000",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_params(tmp_path, MODEL, random_params(MODEL, 2))


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.999])
def test_truncated_file_is_a_value_error(checkpoint: Path, keep: float) -> None:
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_params(checkpoint, MODEL, random_params(MODEL, 2))


def test_missing_file_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_params(tmp_path, MODEL, random_params(MODEL, 2))


@pytest.mark.parametrize("config", [*VARIANTS.values(), ModelConfig(vision=VisionConfig(), decoder=DecoderConfig())])
def test_config_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    hf = config_to_hf(config, template="chatml-plain", max_tiles=6)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert read_config(tmp_path) == config


def test_config_errors_name_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    hf = config_to_hf(MODEL, template="chatml-plain", max_tiles=6)

    def broken(change: Callable[[dict], object]) -> str:
        copy = json.loads(json.dumps(hf))
        change(copy)
        file.write_text(json.dumps(copy))
        with pytest.raises(ValueError) as error:
            read_config(tmp_path)
        assert str(error.value).startswith(f"{file}: ")
        return str(error.value)

    assert "GPT2" in broken(lambda c: c["llm_config"].update(architectures=["GPT2LMHeadModel"]))
    assert "rope_scaling" in broken(lambda c: c["llm_config"].update(rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert "force_image_size is 99" in broken(lambda c: c.update(force_image_size=99))
    assert "'patch_size' is missing" in broken(lambda c: c["vision_config"].pop("patch_size"))
    assert "'llm_config' is missing" in broken(lambda c: c.pop("llm_config"))
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["A_qwen2", "A_llama"])
def test_reference_checkpoints_are_written_back_bit_by_bit(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "goldens" / name
    config = read_config(folder)
    assert config == config_from_hf(config_to_hf(config, template="", max_tiles=12))
    params, initialised = load_params(folder, config, random_params(config, 0))
    assert initialised == []
    save_params(tmp_path, config, params)
    theirs = load_file(folder / "model.safetensors")
    del theirs["language_model.lm_head.weight"]
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(ours[key], x, err_msg=key)


def test_packaged_model_loads() -> None:
    folder = Path(mmrm_jax.__file__).parent / "tiny" / "model"
    config = read_config(folder)
    params, initialised = load_params(folder, config, init_params(config, 0))
    assert initialised == ["score"]
    assert all(np.all(np.isfinite(x)) for x in flat(params).values())
