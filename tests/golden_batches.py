"""Reference batches and models as this package's: what the tests against the authors' numbers share."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tiny_models import make_batch, random_params

from mmrm_jax.config import ModelConfig
from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.data.text import Conversation
from mmrm_jax.models.hf.config import read_config
from mmrm_jax.models.hf.weights import load_params
from mmrm_jax.types import Batch, Comparison


def golden_groups(folder: Path, config: ModelConfig) -> list[EncodedGroup]:
    """The collator's batch of comparisons as groups of two responses, split where chosen and rejected part."""
    inputs = dict(np.load(folder / "inputs.npz"))
    context = json.loads((folder / "meta.json").read_text())["token_ids"]["ctx"]

    def conversation(suffix: str, i: int) -> tuple[Conversation, list[np.ndarray]]:
        sides = []
        for side in ("chosen", "rejected"):
            tokens, mask = inputs[f"input_ids_{side}{suffix}"][i], inputs[f"attention_mask_{side}{suffix}"][i]
            sides.append(tokens[: mask.sum()].astype(np.int32))
        shortest = min(map(len, sides))
        apart = np.flatnonzero(np.not_equal(*(s[:shortest] for s in sides)))
        cut = min(apart[0] if len(apart) else shortest, shortest - 1)
        is_visual = sides[0][:cut] == context
        visual = np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32)
        return Conversation(sides[0][:cut], visual), [s[cut:] for s in sides]

    c = config.vision
    values = inputs["pixel_values"].transpose(0, 2, 3, 1) * np.array(c.std) + np.array(c.mean)
    pixels = np.rint(values * 255).astype(np.uint8)
    np.testing.assert_allclose(pixels / 255, values, atol=1e-6)  # the values come from uint8, so nothing is lost
    tiles = np.split(pixels, np.cumsum(inputs["tiles_per_sample"])[:-1])
    groups = []
    for i in range(len(tiles)):
        (primary, responses), (proxy, again) = conversation("", i), conversation("_fake", i)
        assert all(np.array_equal(a, b) for a, b in zip(responses, again))  # both branches share them
        prefixes = {"primary": primary, "proxy": proxy}
        groups.append(EncodedGroup(i, prefixes, tuple(responses), tiles[i], (Comparison(0, 1),)))
    return groups


def golden_batch(groups: list[EncodedGroup], config: ModelConfig, micro_batches: int = 1) -> Batch:
    """[M, ...], the proxy with a blank tile, padded by one in every dimension that has padding."""
    views = {"primary": "multimodal", "proxy": "blank"}
    return make_batch(groups, config, views=views, extra=1, micro_batches=micro_batches)


def golden_models(folder: Path, scratch: Path) -> tuple[ModelConfig, dict[str, nnx.State]]:
    """Configuration and both branches' parameters."""
    config = read_config(folder)
    init = random_params(config, 0)
    params = {}
    for branch, file in (("primary", "model.safetensors"), ("proxy", "proxy.safetensors")):
        (scratch / branch).mkdir(parents=True)
        (scratch / branch / "model.safetensors").symlink_to(folder / file)
        params[branch], initialised = load_params(scratch / branch, config, init)
        assert initialised == []
    return config, params


def one_micro_batch(groups: list[EncodedGroup], config: ModelConfig) -> Batch:
    """The groups as one micro-batch, without its axis."""
    return jax.tree.map(lambda x: x[0], golden_batch(groups, config))
