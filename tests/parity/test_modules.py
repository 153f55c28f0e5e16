"""Module by module against transformers: the same weights and input give the same hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[test,parity]'")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_models import flat, make_batch, one_micro
from torch_models import (
    FAMILIES,
    MODELS,
    make_model,
    random_conversations,
    read_model,
    relative_error,
    save_state_dict,
    torch_hidden,
    torch_pixels,
)

from mmrm_jax.config import ModelConfig
from mmrm_jax.models.hf.config import read_config
from mmrm_jax.models.internvl import pixel_shuffle
from mmrm_jax.models.rope import rope_frequencies, rope_tables
from mmrm_jax.train.state import abstract_model

pytestmark = pytest.mark.filterwarnings("default")
CLOSE = 1e-5
every_model = pytest.mark.parametrize("name", MODELS)


def our_model(config: ModelConfig, params: nnx.State):
    return nnx.merge(abstract_model(config)[0], params)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_namings_of_tensors_are_read(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`save_pretrained` renames what `state_dict` holds; either is read, bit for bit, tied LM head or not."""
    model = make_model(name, tied=False).to(dtype)
    model.save_pretrained(tmp_path / "pretrained")
    save_state_dict(model, tmp_path / "state_dict")
    config, ours = read_model(tmp_path / "pretrained")
    again, other = read_model(tmp_path / "state_dict")
    assert again == config
    for path, x in flat(ours).items():
        np.testing.assert_array_equal(flat(other)[path], x, err_msg=path)
    embedding = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(flat(ours)["decoder/embedding"], embedding)


@every_model
def test_vision_tower_projector_and_decoder(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    config, params = read_model(tmp_path)
    group = random_conversations(config, tiles=2, lengths=(5, 8, 1, 3))
    batch = one_micro(make_batch([group], config, views={"primary": "multimodal"}, extra=1))
    f32 = jnp.dtype("float32")

    @jax.jit
    def run(params, batch):
        ours, prefix = our_model(config, params), batch.prefixes["primary"]
        tower = ours.vision(prefix.pixels[0, :2], select_layer=config.select_layer, dtype=f32)
        features = ours.visual_features(prefix.pixels, f32)
        return tower, features, ours(prefix, batch.responses, f32)

    tower, features, (before, after) = run(params, batch)
    with torch.no_grad():
        pixels = torch_pixels(group.tiles, config)
        theirs = model.model.get_image_features(pixels, output_hidden_states=True)
        want, lengths = torch_hidden(model, group, config)
    assert relative_error(tower, theirs.hidden_states[config.select_layer]) < CLOSE
    if config.select_layer == -1:
        assert relative_error(tower, theirs.last_hidden_state) < CLOSE
    assert relative_error(features[0, : 2 * config.visual_tokens_per_tile], theirs.pooler_output.flatten(0, 1)) < CLOSE
    start = len(group.prefixes["primary"].tokens)
    for n, length in enumerate(lengths.tolist()):
        assert relative_error(before[0, :start], want[n, :start]) < CLOSE
        end = int(batch.responses.last[0, n]) + 1
        ours = after[0].reshape(-1, after.shape[-1])[end - (length - start) : end]
        assert relative_error(ours, want[n, start:length]) < CLOSE


@every_model
def test_decoder_without_an_image(name: str, tmp_path: Path) -> None:
    """Text alone, as a proxy sees it, in one conversation."""
    model = make_model(name)
    model.save_pretrained(tmp_path)
    config, params = read_model(tmp_path)
    group = random_conversations(config, tiles=0, lengths=(6,), prefix=12)
    tokens, response = group.prefixes["primary"].tokens, group.responses[0]

    @jax.jit
    def run(params):
        decoder = our_model(config, params).decoder
        embedded = [decoder.embed(jnp.asarray(x)[None], jnp.dtype("float32")) for x in (tokens, response)]
        positions = jnp.arange(len(response))[None, None]
        return decoder(embedded[0], jnp.full((1,), len(tokens)), embedded[1][None], positions)

    before, after = run(params)
    with torch.no_grad():
        want, _ = torch_hidden(model, group, config)
    assert relative_error(np.concatenate([before[0], after[0, 0]]), want[0]) < CLOSE


@pytest.mark.parametrize("length", [3, 20, 21, 33, 100])
@every_model
def test_rotary_embeddings(name: str, length: int, tmp_path: Path) -> None:
    """At and around the lengths where scaling begins, and far beyond them."""
    model = make_model(name)
    model.config.save_pretrained(tmp_path)
    config = read_config(tmp_path).decoder
    positions = np.arange(length)[None]
    frequencies = rope_frequencies(config, jnp.asarray([length]))
    cos, sin = rope_tables(config, frequencies, jnp.asarray(positions))
    theirs = model.model.language_model.rotary_emb(torch.zeros(1), torch.tensor(positions))
    half = config.head_width // 2
    for ours, want in ((cos, theirs[0]), (sin, theirs[1])):
        assert relative_error(ours[0, :, 0], want[0, :, :half]) < CLOSE
        assert relative_error(ours[0, :, 0], want[0, :, half:]) < CLOSE


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_pixel_shuffle(ratio: float) -> None:
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    want = make_model("qwen2").model.pixel_shuffle(torch.tensor(x), scale_factor=ratio)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), ratio, "v2"), want)
    # The first release's layout has rows and columns the other way round.
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), ratio, "v1"), want.transpose(1, 2))
