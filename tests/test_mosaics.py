"""Mosaics: the same for the same seed, and answers that the pixels bear out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import make_batch, one_micro, random_group, random_params

from mmrm_jax.models.hf.config import read_config
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.tiny.mosaics import COLOURS, NAMES, PLACES, make_mosaic, make_mosaic_check
from mmrm_jax.tiny.recipe import Recipe, colour_histograms, mean_colours, model_config, model_of, resized
from mmrm_jax.train.state import abstract_model

CONFIG = model_config(64, 2)


def nearest(pixels: np.ndarray) -> np.ndarray:
    """The number of the name nearest to each pixel."""
    palette = np.asarray(list(COLOURS.values()), np.float64)
    return np.argmin(np.sum((pixels[:, :, None].astype(np.float64) - palette) ** 2, axis=-1), axis=-1)


def test_a_picture_depends_on_its_seed_and_index_alone():
    a, b, other = make_mosaic(1, 7), make_mosaic(1, 7), make_mosaic(2, 7)
    assert (a.prompt, a.answer) == (b.prompt, b.answer) and np.array_equal(a.pixels, b.pixels)
    assert not np.array_equal(a.pixels, other.pixels)
    assert not np.array_equal(make_mosaic_check(1, 7).pixels, a.pixels)


def test_answers_follow_the_pixels():
    right: dict[str, list[bool]] = {"colours": [], "place": [], "yes": [], "no": []}
    for i in range(600):
        picture = make_mosaic(0, i)
        names = nearest(picture.pixels)
        shares = np.bincount(names.ravel(), minlength=len(NAMES)) / names.size
        if picture.prompt.startswith("Is there any "):
            name = picture.prompt.removeprefix("Is there any ").removesuffix(" in the picture?")
            kind = picture.answer.rstrip(".").lower()
            right[kind].append((shares[NAMES.index(name)] > 0.02) == (kind == "yes"))
        elif picture.prompt.startswith("Which colour is most of the "):
            place = picture.prompt.removeprefix("Which colour is most of the ").rstrip("?")
            row, column = (round(16 * c) for c in PLACES[place])
            part = names[row : row + 16, column : column + 16]
            right["place"].append(NAMES[np.bincount(part.ravel()).argmax()] == picture.answer.rstrip(".").lower())
        else:
            right["colours"].append(NAMES[int(shares.argmax())] == picture.answer.rstrip(".").lower().split(", ")[0])
    assert all(len(found) > 60 for found in right.values())
    # Light, grain and shades that are a little off move some pixels to a neighbouring name.
    assert all(np.mean(found) > 0.75 for found in right.values()), {k: np.mean(v) for k, v in right.items()}
    assert 0.4 < len(right["yes"]) / (len(right["yes"]) + len(right["no"])) < 0.6


def test_checks_are_yes_or_no():
    answers = [make_mosaic_check(0, i).answer for i in range(200)]
    assert set(answers) == {"Yes.", "No."} and 70 < answers.count("Yes.") < 130


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_mean_colours_are_those_under_each_visual_token(version: Literal["v1", "v2"]) -> None:
    """Read back from pictures that are grey but for one quarter of one patch."""
    config = dataclasses.replace(CONFIG, pixel_shuffle=version)
    side, patch = CONFIG.vision.image_size, CONFIG.vision.patch_size
    quarters = 2 * side // patch
    tokens = int(CONFIG.visual_tokens_per_tile**0.5)
    for row, column in [(0, 0), (0, quarters - 1), (2, 5), (quarters - 1, 1)]:
        pixels = np.full((1, 2, side, side, 3), 128, np.uint8)
        half = patch // 2
        pixels[0, 1, row * half : (row + 1) * half, column * half : (column + 1) * half] = (255, 128, 64)
        found = np.asarray(mean_colours(jnp.asarray(pixels), config))
        assert found.shape == (1, 2 * tokens**2, 3 * (quarters // tokens) ** 2)
        place = (row * tokens // quarters, column * tokens // quarters)
        token = place[0] * tokens + place[1] if version == "v2" else place[1] * tokens + place[0]
        np.testing.assert_allclose(np.sort(found[0, tokens**2 + token])[[0, -1]], [-1, 255 / 64 - 2])
        assert np.count_nonzero(found) == 2


def test_histograms_are_those_under_each_visual_token() -> None:
    """Pictures of one cell's colour but for the corner of one visual token."""
    side, tokens = CONFIG.vision.image_size, CONFIG.visual_tokens_per_tile
    across, area = int(tokens**0.5), int(side / tokens**0.5)
    for token in range(tokens):
        pixels = np.full((1, 2, side, side, 3), (32, 96, 224), np.uint8)
        row, column = token // across * area, token % across * area
        pixels[0, 1, row : row + area // 2, column : column + area // 2] = (128, 0, 255)  # half of two cells
        want = np.zeros((2 * tokens, 64))
        cell = 0 * 16 + 1 * 4 + 3
        want[:, cell] = 1
        want[tokens + token, cell] = 0.75**0.5
        want[tokens + token, [1 * 16 + 3, 2 * 16 + 3]] = 0.125**0.5
        np.testing.assert_allclose(np.asarray(colour_histograms(jnp.asarray(pixels), CONFIG))[0], 8 * want, atol=1e-5)


def test_every_pixel_counts_once() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    found = np.asarray(colour_histograms(jnp.asarray(pixels), CONFIG))
    np.testing.assert_allclose((found**2).sum(-1), 64, rtol=1e-5)


def test_the_recipe_makes_models_of_the_packaged_family() -> None:
    packaged = read_config(MODEL_DIR)
    recipe = Recipe(Path("out"))
    assert model_config(recipe.width, recipe.layers) == packaged
    large = model_config(96, 3)
    assert (large.vision.num_layers, large.decoder.num_layers) == (3, 3)
    assert large.decoder.num_heads * large.decoder.head_width == large.vision.width == large.decoder.width == 96
    for width, layers in [(40, 2), (0, 2), (64, 0)]:
        with pytest.raises(ValueError, match=f"width {width} .* layers {layers}"):
            Recipe(Path("out"), width=width, layers=layers)


def test_a_model_starts_from_another_of_the_family() -> None:
    packaged = read_config(MODEL_DIR)
    params = random_params(packaged, 0)
    rng = np.random.default_rng(0)
    batch = one_micro(make_batch([random_group(packaged, rng, 0, tiles=1, responses=2)], packaged))
    batch = jax.tree.map(jnp.asarray, batch)
    rewards = {}
    for layers in (1, 2, 4):
        config = model_of(Recipe(Path("out"), layers=layers, start=MODEL_DIR))
        assert config.vision == packaged.vision and config.decoder.num_layers == layers
        found = resized(params, random_params(config, 1))
        graphdef, like = abstract_model(config)
        assert jax.tree.map(jnp.shape, nnx.to_pure_dict(found)) == jax.tree.map(jnp.shape, nnx.to_pure_dict(like))
        model = nnx.merge(graphdef, found)
        rewards[layers] = np.asarray(model.rewards(batch.prefixes["primary"], batch.responses, jnp.dtype("float32")))
    np.testing.assert_allclose(rewards[4], rewards[2], atol=1e-5)
    assert np.abs(rewards[1] - rewards[2]).max() > 1e-3
    with pytest.raises(ValueError, match="width is 96; .*, to start from, is 64 wide"):
        model_of(Recipe(Path("out"), width=96, start=MODEL_DIR))
