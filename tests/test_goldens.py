"""The authors' numbers: every model family, vision tower, RoPE table and reward position in the reference data."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_batches import golden_groups, golden_models, one_micro_batch
from goldens import fixtures
from safetensors.numpy import load_file, save_file
from tiny_models import DECODER, random_params, relative_errors

from mmrm_jax.config import DecoderConfig, DynamicRope, LinearRope, LongRope, ModelConfig
from mmrm_jax.models.hf.config import config_from_hf, read_config
from mmrm_jax.models.hf.decoder_config import decoder_to_hf
from mmrm_jax.models.hf.weights import load_params, save_params
from mmrm_jax.models.rope import rope_frequencies, rope_tables
from mmrm_jax.objectives import Seen, margins, shortcut_aware, standard
from mmrm_jax.train.state import abstract_model
from mmrm_jax.train.step import branch_rewards
from mmrm_jax.types import Batch, Prefix, Responses

# On rewards absolute, since they are of order 1. On gradients relative to the largest entry of the same parameter's
# gradient, the strictest choice that still means something in float32, where small entries are sums that cancel.
TOLERANCE = 1e-5


MODELS = fixtures("", "model.safetensors", "proxy.safetensors", "inputs.npz", "outputs.npz", "meta.json")


def close(got, want, what: str = "") -> None:
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * max(1.0, np.abs(want).max()), err_msg=what)


@pytest.mark.parametrize("folder", MODELS)
def test_features_and_hidden_states_are_the_authors(folder: Path, tmp_path: Path) -> None:
    config, params = golden_models(folder, tmp_path)
    groups = golden_groups(folder, config)
    batch, outputs = one_micro_batch(groups, config), np.load(folder / "outputs.npz")

    @jax.jit
    def run(params: nnx.State, prefix: Prefix, batch: Batch):
        model = nnx.merge(abstract_model(config)[0], params)
        features = model.visual_features(prefix.pixels, jnp.dtype("float32"))
        towers = model.vision(prefix.pixels[:, 0])
        return features, towers, model(prefix, batch.responses, jnp.dtype("float32"))

    for branch, theirs in (("primary", "main"), ("proxy", "bias")):
        features, towers, (before, after) = run(params[branch], batch.prefixes[branch], batch)
        if branch == "primary":
            count = config.visual_tokens_per_tile
            tiles = [features[g, : len(group.tiles) * count] for g, group in enumerate(groups)]
            want = outputs["vit_embeds_main"]
            close(np.concatenate(tiles), want.reshape(-1, want.shape[-1]))
            close(towers[:1], outputs["vision_last_hidden_main_tile0"])
        else:
            close(features, outputs["vit_embeds_bias_white"])
        for n, side in enumerate(("chosen", "rejected")):
            want = outputs[f"last_hidden_{side}_{theirs}"]
            suffix = "" if branch == "primary" else "_fake"
            last = outputs[f"pool_index_{side}{suffix}"]
            for g, group in enumerate(groups):
                split, length = len(group.prefixes[branch].tokens), len(group.responses[n])
                assert split + length == last[g] + 1  # the reward is read where the authors read it
                end = int(batch.responses.last[g, n]) + 1
                got = np.concatenate([before[g, :split], after[g].reshape(-1, after.shape[-1])[end - length : end]])
                close(got, want[g, : split + length], f"{branch} {side} {g}")


@pytest.mark.parametrize("folder", MODELS)
def test_rewards_losses_and_gradients_are_the_authors(folder: Path, tmp_path: Path) -> None:
    outputs = dict(np.load(folder / "outputs.npz"))
    meta = json.loads((folder / "meta.json").read_text())
    config, params = golden_models(folder, tmp_path)
    graphdef, _ = abstract_model(config)
    groups = golden_groups(folder, config)
    batch = one_micro_batch(groups, config)
    valid = batch.comparisons.mask

    @jax.jit
    def run(params, batch, margin):
        comparisons = batch.comparisons

        def losses(params):
            rewards = branch_rewards(graphdef, params, nnx.State({}), batch, jnp.dtype("float32"))
            d = {b: margins(r, comparisons) for b, r in rewards.items()}
            robust = shortcut_aware().terms(Seen(rewards, comparisons))
            alone = Seen({"primary": rewards["primary"]}, comparisons)
            plain = standard().terms(alone).loss
            wider = dataclasses.replace(comparisons, margin=margin)
            with_margin = standard().terms(dataclasses.replace(alone, comparisons=wider)).loss
            means = [
                jnp.sum(x * comparisons.mask) / jnp.sum(comparisons.mask) for x in (robust.loss, plain, with_margin)
            ]
            return tuple(means), (rewards, d, (robust.sfc, robust.branch_losses))

        means, vjp, (rewards, d, terms) = jax.vjp(losses, params, has_aux=True)
        return means, rewards, d, terms, vjp((1.0, 0.0, 0.0))[0], vjp((0.0, 1.0, 0.0))[0]

    margin = np.zeros(valid.shape, np.float32)
    margin[valid] = outputs["margin"]
    (robust, plain, with_margin), rewards, d, (sfc, own_losses), grads, standard_grads = run(params, batch, margin)

    for branch, theirs in (("primary", "main"), ("proxy", "bias")):
        want = np.concatenate([outputs[f"rewards_{side}_{theirs}"] for side in ("chosen", "rejected")], axis=1)
        np.testing.assert_allclose(rewards[branch][: len(groups), :2], want, rtol=0, atol=TOLERANCE)
        got = np.asarray(d[branch])[valid]
        np.testing.assert_allclose(got, outputs[f"{theirs}_logit_diff"][:, 0], rtol=0, atol=TOLERANCE)
        own = np.asarray(own_losses[branch])[valid]
        np.testing.assert_allclose(own, outputs[f"loss_{theirs}_per_sample"][:, 0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(sfc[valid], outputs["scale_1"][:, 0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(robust, outputs["loss_robust"], rtol=TOLERANCE)
    np.testing.assert_allclose(plain, outputs["loss_standard"], rtol=TOLERANCE)
    np.testing.assert_allclose(with_margin, outputs["loss_standard_margin_elementwise"], rtol=TOLERANCE)

    # Gradients under the checkpoint's names: some whole, the norm of every one.
    for theirs, ours, norms, named in (
        ("main", grads["primary"], meta["grad_norms_robust"], ""),
        ("bias", grads["proxy"], meta["grad_norms_robust"], "bias_reward_model."),
        ("standard", standard_grads["primary"], meta["grad_norms_standard"], ""),
    ):
        save_params(tmp_path, config, ours)
        got = load_file(tmp_path / "model.safetensors")
        start = f"grad.{theirs}."
        want = {k.removeprefix(start): v for k, v in outputs.items() if k.startswith(start)}
        errors = relative_errors({k: got[k] for k in want}, want)
        assert max(errors.values()) < TOLERANCE, (theirs, errors)
        for k, v in got.items():
            assert np.linalg.norm(v.astype(np.float64)) == pytest.approx(norms[named + k], rel=TOLERANCE), (theirs, k)


@pytest.mark.parametrize("folder", fixtures("", "model.safetensors", "config.json"))
def test_checkpoints_are_written_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder)
    params, initialised = load_params(folder, config, random_params(config, 0))
    assert initialised == []
    save_params(tmp_path, config, params)
    theirs = load_file(folder / "model.safetensors")
    for head in ("output", "lm_head"):
        theirs.pop(f"language_model.{head}.weight", None)
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(ours[key], x, err_msg=key)


def variant(folder: Path, name: str, **fields) -> ModelConfig:
    """The tower of a file, in front of a small decoder of the width its projector has."""
    width = load_file(folder / f"vision_{name}.safetensors")["mlp1.3.bias"].shape[0]
    vision = json.loads((folder / f"vision_config_{name}.json").read_text())
    decoder = dataclasses.replace(DECODER, width=width)
    return config_from_hf({"vision_config": vision, "llm_config": decoder_to_hf(decoder), **fields})


@pytest.mark.parametrize("name", ["ln", "rms"])
@pytest.mark.parametrize("folder", fixtures("vision_variants", "data.npz"))
def test_visual_features_are_the_authors(folder: Path, name: str, tmp_path: Path) -> None:
    """Both tower styles, pixel shuffles and selected layers, and position tables resized to other image sizes."""
    data = np.load(folder / "data.npz")
    config = variant(folder, name)
    save_params(tmp_path, config, random_params(config, 0))
    tensors = load_file(tmp_path / "model.safetensors") | load_file(folder / f"vision_{name}.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    params, _ = load_params(tmp_path, config, random_params(config, 0))
    pattern = re.compile(name + r"\.features_(\d+)_ps(v\d)_layer(-?\d+)")
    cases = [(k, int(m[1]), m[2], int(m[3])) for k in data.files if (m := pattern.fullmatch(k))]
    sizes = {size for _, size, _, _ in cases}
    assert len(sizes) > 1 and config.vision.image_size in sizes

    def run(params, values, fields):
        model = nnx.merge(abstract_model(variant(folder, name, **fields))[0], params)
        blank = jnp.zeros(values.shape, jnp.uint8)
        # The file holds noise that comes from no uint8 image, so it goes in behind the normalisation.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmrm_jax.models.vision.normalise_pixels", lambda pixels, config: values)
            features = model.visual_features(blank[:, None], jnp.dtype("float32"))
            return features, model.vision(blank), model.vision.positions()

    for key, size, shuffle, layer in cases:
        values = jnp.asarray(data[f"pixel_values_{size}"].transpose(0, 2, 3, 1))
        fields = {"force_image_size": size, "ps_version": shuffle, "select_layer": layer}
        features, last, positions = jax.jit(functools.partial(run, fields=fields))(params, values)
        close(features, data[key], key)
        close(last, data[f"{name}.vit_last_{size}"], key)
        close(positions[None, 1:], data[f"{name}.pos_embed_{size}"], key)


def tables(decoder: DecoderConfig, length: int, positions: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Cosines and sines [positions, head_width] of a conversation of this length, in the authors' layout."""
    positions = np.arange(length) if positions is None else positions
    frequencies = rope_frequencies(decoder, jnp.array([length]))
    made = rope_tables(decoder, frequencies, jnp.asarray(positions, jnp.int32)[None])
    return {name: np.tile(np.asarray(x)[0, :, 0], (1, 2)) for name, x in zip(("cos", "sin"), made)}


@pytest.mark.parametrize("folder", fixtures("rope", "rope.npz"))
def test_rope_tables_are_the_authors(folder: Path) -> None:
    data = np.load(folder / "rope.npz")
    compared = 0
    for key in data.files:
        name, _, part = key.rpartition(".")
        if part not in ("cos", "sin"):
            continue
        want = data[key]
        decoder = DecoderConfig(head_width=want.shape[1], rope_theta=1e6)
        if found := re.fullmatch(r"ntk_max(\d+)_f(\d+)\.(\w+)", name):
            decoder = dataclasses.replace(decoder, rope_scaling=DynamicRope(float(found[2]), int(found[1])))
            got = tables(decoder, len(want))[part]
            if found[3].endswith("_after"):
                # The reference keeps the table of the longest sequence it has seen; ours depends on this one alone.
                assert np.abs(got - want).max() > 0.1, key
                continue
        elif found := re.fullmatch(r"linear_f(\d+)", name):
            decoder = dataclasses.replace(decoder, rope_theta=1e4, rope_scaling=LinearRope(float(found[1])))
            got = tables(decoder, len(want))[part]
        elif found := re.fullmatch(r"phi3_(su|yarn)_len(\d+)", name):
            stated = re.search(
                r"phi3_.* max (?P<max>\d+) original (?P<original>\d+)", (folder / "README.txt").read_text()
            )
            assert stated is not None
            rope = LongRope(
                tuple(data["phi3_short"].tolist()),
                tuple(data["phi3_long"].tolist()),
                original_length=int(stated["original"]),
                max_length=int(stated["max"]),
                kind=found[1],
            )
            decoder = dataclasses.replace(decoder, rope_theta=1e4, rope_scaling=rope)
            got = tables(decoder, len(want))[part]
        else:
            positions = data["positions"]
            got = tables(decoder, int(positions.max()) + 1, positions)[part]
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=key)
        compared += 1
    assert compared > 10


@dataclasses.dataclass(frozen=True)
class Pooling:
    """The model of the set, and noise for images: one tile a row."""

    folder: Path

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "data.npz"))

    @functools.cached_property
    def run(self):
        """(prefix, responses, pixels) -> the head's value at every token, and the reward, of every row."""
        config = read_config(self.folder)
        params, _ = load_params(self.folder, config, random_params(config, 0))
        graphdef, _ = abstract_model(config)

        @jax.jit
        def run(params, prefix, responses, values):
            model = nnx.merge(graphdef, params)
            with pytest.MonkeyPatch.context() as patch:  # noise, as in the test of the vision tower
                patch.setattr("mmrm_jax.models.vision.normalise_pixels", lambda pixels, config: values)
                before, after = model(prefix, responses, jnp.dtype("float32"))
                rewards = model.rewards(prefix, responses)
            return jnp.concatenate([before, after[:, 0]], axis=1) @ model.score[...], rewards[:, 0]

        return functools.partial(run, params)

    def __call__(self, tokens: np.ndarray, images: list[int]):
        """`run` on rows without padding, each with its image; image tokens and two tokens more are the prefix."""
        context = self.data["input_ids"][0, 2]  # <IMG_CONTEXT>, behind the tag that opens an image
        rows, length = tokens.shape
        split = int(np.flatnonzero(np.any(tokens == context, axis=0))[-1]) + 3
        prefixes = tokens[:, :split].astype(np.int32)
        visual = np.where(prefixes == context, np.cumsum(prefixes == context, axis=1) - 1, -1).astype(np.int32)
        pixels = self.data["pixel_values"].transpose(0, 2, 3, 1)[images]
        blank = np.zeros((rows, 1, *pixels.shape[1:]), np.uint8)
        prefix = Prefix(prefixes, np.full(rows, split, np.int32), visual, blank)
        padded = np.pad(tokens[:, None, split:].astype(np.int32), ((0, 0), (0, 0), (0, 3)), constant_values=7)
        positions = np.tile(np.pad(np.arange(length - split, dtype=np.int32), (0, 3)), (rows, 1, 1))
        last = np.full((rows, 1), length - split - 1, np.int32)
        return self.run(prefix, Responses(padded, positions, last, np.zeros(rows, np.int32)), pixels)


POOLING = fixtures("pooling", "data.npz", "model.safetensors")


@pytest.mark.parametrize("folder", POOLING)
def test_reward_positions_come_from_lengths(folder: Path) -> None:
    """The reference looks for the pad token, which is also the end of every turn; ours is told the length."""
    pooling = Pooling(folder)
    data = pooling.data
    for i, (row, mask) in enumerate(zip(data["input_ids"], data["attention_mask"])):
        start, end = np.flatnonzero(mask)[[0, -1]]
        tokens = row[start : end + 1]
        by_token, reward = (found[0] for found in pooling(tokens[None], [i]))
        # RoPE is relative, so leaving out padding on the left changes nothing.
        want = data["token_rewards"][i, start : end + 1]
        alike = len(want) if mask[start : end + 1].all() else int(np.argmin(mask[start : end + 1]))
        np.testing.assert_allclose(by_token[:alike], want[:alike], rtol=0, atol=TOLERANCE)
        assert float(reward) == pytest.approx(float(by_token[len(tokens) - 1]), abs=1e-6)
        if data["pool_index"][i] == end:
            assert float(reward) == pytest.approx(float(data["rewards"][i, 0]), abs=TOLERANCE)
        else:  # it reads padding on the left as the end, or an end of turn in the middle
            assert abs(float(reward) - data["rewards"][i, 0]) > 0.01


@pytest.mark.parametrize("folder", POOLING)
def test_a_row_with_too_few_image_tokens_gives_no_other_its_image(folder: Path) -> None:
    """The reference fills a batch's image tokens in order: where one row lacks its own, the next gets its image."""
    pooling = Pooling(folder)
    data = pooling.data
    lacking, whole = rows = data["mismatch_input_ids"]
    context = data["input_ids"][0, 2]
    assert np.count_nonzero(lacking == context) < np.count_nonzero(whole == context)
    # The batch is two neighbours of the other test; where the reference reads the reward is that test's matter.
    at = next(i for i, tokens in enumerate(data["input_ids"]) if np.array_equal(tokens, whole))
    last, alone = data["pool_index"][at], data["token_rewards"][at]
    together = pooling(rows, [at - 1, at])[0][1]
    np.testing.assert_allclose(together[: last + 1], alone[: last + 1], rtol=0, atol=TOLERANCE)
    theirs, mixed_up = float(data["mismatch_rewards"][1, 0]), pooling(rows, [at, at - 1])[0][1]
    assert theirs == pytest.approx(float(mixed_up[last]), abs=TOLERANCE)
    assert abs(theirs - float(together[last])) > 100 * TOLERANCE
