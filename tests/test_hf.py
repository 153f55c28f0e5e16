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
from tiny_models import DECODER, MODEL, flat, random_params

import mmrm_jax
from mmrm_jax.config import (
    DecoderConfig,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    ModelConfig,
    VisionConfig,
)
from mmrm_jax.models.hf.config import config_from_hf, config_to_hf, config_to_native, read_config
from mmrm_jax.models.hf.names import checkpoint_layout, name_table
from mmrm_jax.models.hf.weights import load_params, save_params
from mmrm_jax.train.state import abstract_model, init_params

LONG = LongRope((1.0, 1.5), (2.0, 5.0), original_length=16, max_length=64)
DECODERS = {
    "qwen2": DECODER,
    "internlm2": dataclasses.replace(
        DECODER, family="internlm2", qkv_bias=False, rope_scaling=DynamicRope(2.0, 64), rope_theta=1e6
    ),
    "internlm2 with biases": dataclasses.replace(DECODER, family="internlm2", o_bias=True),
    "phi3": dataclasses.replace(DECODER, family="phi3", qkv_bias=False, rope_scaling=LONG),
    "llama": dataclasses.replace(DECODER, family="llama", qkv_bias=False, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 32)),
    "llama with biases": dataclasses.replace(DECODER, family="llama", o_bias=True, rope_scaling=LinearRope(2.0)),
    "qwen3": dataclasses.replace(DECODER, family="qwen3", qkv_bias=False, qk_norm=True, head_width=8),
}
RMS_VISION = dataclasses.replace(MODEL.vision, norm="rms_norm", qk_norm=True, qkv_bias=False, num_layers=2)
VARIANTS = {name: dataclasses.replace(MODEL, decoder=decoder) for name, decoder in DECODERS.items()}
VARIANTS["llama"] = dataclasses.replace(VARIANTS["llama"], vision=RMS_VISION, pixel_shuffle="v1", select_layer=-2)
RESIZED = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, image_size=16, position_image_size=8))
LAYOUTS = [(name, layout) for name in VARIANTS for layout in ("chat", "native")]


def test_what_the_native_layout_cannot_hold_is_said_in_words() -> None:
    rope = dataclasses.replace(LONG, kind="yarn")
    phi3 = dataclasses.replace(VARIANTS["phi3"], decoder=dataclasses.replace(DECODERS["phi3"], rope_scaling=rope))
    for config, what in ((phi3, "a RoPE scaling of type yarn"), (RESIZED, "of 8 pixels resized for tiles of 16")):
        with pytest.raises(ValueError, match=f"{what}; use the chat layout"):
            config_to_native(config, image_token_id=7)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_params(tmp_path, MODEL, random_params(MODEL, 1))
    return tmp_path


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_round_trip_is_bit_exact(name: str, layout: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    params = random_params(config, 1)
    save_params(tmp_path, config, params, layout=layout)
    loaded, initialised = load_params(tmp_path, config, random_params(config, 2))
    assert initialised == []
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for name, x in flat(params).items():
        np.testing.assert_array_equal(flat(loaded)[name], x, err_msg=name)
        assert flat(loaded)[name].dtype == np.float32
    first = (tmp_path / "model.safetensors").read_bytes()
    save_params(tmp_path, config, loaded, layout=layout)
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_parameter_has_one_place(name: str, layout: str) -> None:
    table = name_table(VARIANTS[name], layout)
    assert {"/".join(e.path) for e in table} == flat(abstract_model(VARIANTS[name])[1]).keys()
    assert len({e.path for e in table}) == len(table)
    assert checkpoint_layout([e.name for e in table]) == layout
    # Entries that share a tensor fill it exactly: every row belongs to one of them.
    for tensor in {e.name for e in table}:
        entries = [e for e in table if e.name == tensor]
        if len(entries) == 1:
            assert entries[0].rows is None
            continue
        owners = np.zeros(entries[0].rows.total, int)
        for e in entries:
            for start in range(e.rows.start, e.rows.total, e.rows.stride):
                owners[start : start + e.rows.block] += 1
        assert np.all(owners == 1), tensor


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


def test_packed_layouts_are_those_of_torch(tmp_path: Path) -> None:
    """By the loops in which the reference unpacks them: 4 query heads, 2 key/value heads of width 4."""
    for name in ("internlm2", "phi3"):
        (tmp_path / name).mkdir()
        save_params(tmp_path / name, VARIANTS[name], random_params(VARIANTS[name], 1))
    ours = {x: flat(random_params(VARIANTS["phi3"], 1))[f"decoder/layers/{x}/kernel"][1].T for x in ("q", "k", "v")}
    tensors = load_file(tmp_path / "internlm2" / "model.safetensors")
    packed = tensors["language_model.model.layers.1.attention.wqkv.weight"].reshape(2, 2 + 2, 4, 16)
    for kv in range(2):
        for j in range(2):
            np.testing.assert_array_equal(packed[kv, j], ours["q"].reshape(4, 4, 16)[2 * kv + j])
        np.testing.assert_array_equal(packed[kv, 2], ours["k"].reshape(2, 4, 16)[kv])
        np.testing.assert_array_equal(packed[kv, 3], ours["v"].reshape(2, 4, 16)[kv])
    tensors = load_file(tmp_path / "phi3" / "model.safetensors")
    packed = tensors["language_model.model.layers.1.self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(packed, np.concatenate([ours["q"], ours["k"], ours["v"]]))
    params = flat(random_params(VARIANTS["phi3"], 1))
    packed = tensors["language_model.model.layers.0.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(packed[24:], params["decoder/layers/up/kernel"][0].T)


@pytest.mark.parametrize(
    "config",
    [*VARIANTS.values(), RESIZED, ModelConfig(vision=VisionConfig(drop_path_rate=0.1), decoder=DecoderConfig())],
)
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
    assert "rope_scaling has the type 'yarn'" in broken(
        lambda c: c["llm_config"].update(rope_scaling={"type": "yarn", "factor": 2.0})
    )
    assert "'factor' is missing" in broken(lambda c: c["llm_config"].update(rope_scaling={"type": "dynamic"}))
    assert "llm_config.hidden_act is 'gelu'" in broken(lambda c: c["llm_config"].update(hidden_act="gelu"))
    assert "llm_config.sliding_window is 8" in broken(
        lambda c: c["llm_config"].update(sliding_window=8, use_sliding_window=True)
    )
    assert "force_image_size is 99" in broken(lambda c: c.update(force_image_size=99))
    assert "norm_type is 'batch'" in broken(lambda c: c["vision_config"].update(norm_type="batch"))
    assert "vision_config.hidden_act is 'quick_gelu'" in broken(
        lambda c: c["vision_config"].update(hidden_act="quick_gelu")
    )
    assert "ps_version is 'v3'" in broken(lambda c: c.update(ps_version="v3"))
    assert "'llm_config' is missing" in broken(lambda c: c.pop("llm_config"))
    assert "vision_config is 7; supported: an object" in broken(lambda c: c.update(vision_config=7))
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_config(tmp_path)


def test_absent_fields_have_the_classes_defaults() -> None:
    """InternVisionConfig, InternVLChatConfig and each decoder's configuration class."""
    llm = {"architectures": ["InternLM2ForCausalLM"]}
    config = config_from_hf({"vision_config": {}, "llm_config": llm})
    assert config.vision == VisionConfig(224, 14, 3200, 12800, 48, 25, "rms_norm", 1e-6, False, True)
    assert (config.pixel_shuffle, config.select_layer, config.downsample_ratio) == ("v1", -1, 0.5)
    want = DecoderConfig("internlm2", 103168, 4096, 11008, 32, 32, 32, 128, 1e4, None, 1e-6, True, True)
    assert config.decoder == want
    config = config_from_hf({"text_config": {}, "vision_config": {}})
    want = DecoderConfig("qwen2", 151936, 4096, 22016, 32, 32, 32, 128, 1e4, None, 1e-6, True)
    assert (config.vision, config.decoder) == (VisionConfig(qkv_bias=False), want)
    config = config_from_hf({"vision_config": {}, "llm_config": {"model_type": "phi3"}})
    assert config.decoder == DecoderConfig("phi3", 32064, 3072, 8192, 32, 32, 32, 96, 1e4, None, 1e-5, False)
    config = config_from_hf({"vision_config": {}, "llm_config": {"model_type": "qwen3", "num_key_value_heads": 8}})
    assert (config.decoder.head_width, config.decoder.qk_norm, config.decoder.qkv_bias) == (128, True, False)


@pytest.mark.parametrize("name", VARIANTS)
def test_native_config_round_trip(name: str) -> None:
    config = VARIANTS[name]
    if config.decoder.family == "internlm2" or config.pixel_shuffle == "v1":
        what = "an InternLM2 decoder" if config.decoder.family == "internlm2" else r"pixel shuffle v1 \(ps_version\)"
        with pytest.raises(ValueError, match=f"cannot hold {what}; use the chat layout"):
            config_to_native(config, image_token_id=7)
        return
    hf = json.loads(json.dumps(config_to_native(config, image_token_id=7)))
    assert config_from_hf(hf) == config
    # transformers 5 writes RoPE in one section
    text = hf["text_config"]
    scaling = text.pop("rope_scaling", None) or {"type": "default"}
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": scaling.pop("type", None), **scaling}
    text["rope_parameters"] = {k: v for k, v in text["rope_parameters"].items() if v is not None}
    assert config_from_hf(hf) == config
    renamed = {k: v for k, v in text.items() if k != "rope_parameters"} | {"rope_scaling": text["rope_parameters"]}
    assert config_from_hf({**hf, "text_config": renamed}) == config
    nested = {**text, "rope_parameters": {"full_attention": text["rope_parameters"]}}
    with pytest.raises(ValueError, match="rope_parameters has its own settings for full_attention"):
        config_from_hf({**hf, "text_config": nested})
    with pytest.raises(ValueError, match="image_seq_length is 5"):
        config_from_hf({**hf, "image_seq_length": 5})
    with pytest.raises(ValueError, match=r"vision_config.image_size is \[8, 16\]"):
        config_from_hf({**hf, "vision_config": {**hf["vision_config"], "image_size": [8, 16]}})


def test_a_decoder_its_family_cannot_have_is_refused() -> None:
    wrong = dataclasses.replace(DECODER, family="phi3", qk_norm=True)
    with pytest.raises(ValueError, match=r"Phi3ForCausalLM cannot have .*qkv_bias, qk_norm"):
        config_to_hf(dataclasses.replace(MODEL, decoder=wrong), template="", max_tiles=1)


def test_packaged_model_loads() -> None:
    folder = Path(mmrm_jax.__file__).parent / "tiny" / "model"
    config = read_config(folder)
    params, initialised = load_params(folder, config, init_params(config, 0))
    assert initialised == ["score"]
    assert all(np.all(np.isfinite(x)) for x in flat(params).values())
