"""The layout of transformers' own InternVL: what its code computes, and its tensors' names, from `data/native`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import flat, random_params

from mmrm_jax.models.hf.config import config_from_hf, config_to_native, read_config
from mmrm_jax.models.hf.weights import checkpoint_problems, load_params, save_params
from mmrm_jax.train.state import abstract_model, init_params
from mmrm_jax.types import Prefix, Responses

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "data" / "native").glob("*/config.json"))
by_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)


@by_model
def test_hidden_states_are_those_of_transformers(folder: Path) -> None:
    config, data = read_config(folder), np.load(folder / "outputs.npz")
    params, initialised = load_params(folder, config, init_params(config, 0))
    assert initialised == ["score"]
    tokens, split = data["input_ids"].astype(np.int32), 8
    is_visual = tokens[:, :split] == tokens[0, 2]
    visual = np.where(is_visual, np.cumsum(is_visual, axis=1) - 1, -1).astype(np.int32)
    values = jnp.asarray(data["pixel_values"].transpose(0, 2, 3, 1))
    blank = np.zeros((1, 1, *values.shape[1:]), np.uint8)
    prefix = Prefix(tokens[:, :split], np.array([split], np.int32), visual, blank)
    length = tokens.shape[1] - split
    positions = np.arange(length, dtype=np.int32)[None, None]
    responses = Responses(tokens[:, None, split:], positions, np.array([[length - 1]], np.int32), np.zeros(1, np.int32))

    @jax.jit
    def run(params, prefix, responses):
        model = nnx.merge(abstract_model(config)[0], params)
        return model(prefix, responses, jnp.dtype("float32"))

    with pytest.MonkeyPatch.context() as patch:  # the pixels are noise that comes from no uint8 image
        patch.setattr("mmrm_jax.models.vision.normalise_pixels", lambda pixels, config: values)
        before, after = run(params, prefix, responses)
    got = np.concatenate([before[0], after[0, 0]])
    np.testing.assert_allclose(got, data["last_hidden"][0], rtol=0, atol=1e-5)


@by_model
def test_saved_files_are_those_of_save_pretrained(folder: Path, tmp_path: Path) -> None:
    config, theirs = read_config(folder), load_file(folder / "model.safetensors")
    assert config_from_hf(config_to_native(config, image_token_id=20)) == config
    params, _ = load_params(folder, config, random_params(config, 0))
    save_params(tmp_path, config, params, layout="native")
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.pop("score.weight").shape == (1, config.decoder.width)
    theirs.pop("language_model.lm_head.weight", None)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


@by_model
def test_names_of_state_dict_are_read_too(folder: Path, tmp_path: Path) -> None:
    config, saved = read_config(folder), load_file(folder / "model.safetensors")
    renamed = {}
    for name, x in saved.items():
        own = name.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
        renamed[own if own.startswith("lm_head") else f"model.{own}"] = x
    state_dict = set((folder / "state_dict.txt").read_text().split())
    assert renamed.keys() | {"lm_head.weight"} == state_dict
    save_file(renamed, tmp_path / "model.safetensors")
    init = init_params(config, 0)
    want, got = (flat(load_params(path, config, init)[0]) for path in (folder, tmp_path))
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


@by_model
def test_a_tensor_under_two_names_is_reported(folder: Path, tmp_path: Path) -> None:
    """One of them would win without a word. The LM head is no exception: export carries it over."""
    config, saved = read_config(folder), load_file(folder / "model.safetensors")
    name = "language_model.model.norm.weight"
    alias = name.replace("language_model.model.", "model.language_model.")
    head = {n: np.zeros((2, 2), np.float32) for n in ("lm_head.weight", "language_model.lm_head.weight")}
    save_file(saved | {alias: saved[name] + 1} | head, tmp_path / "model.safetensors")
    want = [
        "repeated: language_model.lm_head.weight and lm_head.weight name one parameter",
        f"repeated: {name} and {alias} name one parameter",
    ]
    assert checkpoint_problems(tmp_path, config, init_params(config, 0)) == want
    with pytest.raises(ValueError, match=f"{name} and {alias}"):
        load_params(tmp_path, config, init_params(config, 0))
