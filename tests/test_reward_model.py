"""The two-stream forward against an ordinary causal forward per response, and against the authors' numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import (
    DECODER,
    VISION,
    flat,
    make_batch,
    one_micro,
    random_group,
    random_params,
    relative_errors,
    scribble,
)

from mmrm_jax.config import DecoderConfig, ModelConfig, VisionConfig
from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.data.text import Conversation
from mmrm_jax.models.hf.config import read_config
from mmrm_jax.models.hf.weights import load_params, save_params
from mmrm_jax.objectives import margins, shortcut_aware, standard
from mmrm_jax.train.state import abstract_model
from mmrm_jax.train.step import branch_rewards
from mmrm_jax.types import Batch, Comparison

# Tolerance on rewards: absolute, since they are of order 1. On gradients: relative to the largest entry of the same
# parameter's gradient, the strictest choice that still means something in float32, where small entries are sums
# of large terms that cancel.
TOLERANCE = 1e-5

# Between them: both norms, with and without biases and q/k norm, both pixel shuffles, both selected layers, grouped and
# ordinary attention, unrolled and scanned layers.
QWEN = ModelConfig(vision=dataclasses.replace(VISION, num_layers=2), decoder=DECODER)
LLAMA = ModelConfig(
    vision=dataclasses.replace(VISION, num_layers=3, norm="rms_norm", qkv_bias=False, qk_norm=True),
    decoder=dataclasses.replace(DECODER, num_layers=5, num_kv_heads=4, qkv_bias=False, norm_eps=1e-5),
    pixel_shuffle="v1",
    select_layer=-2,
)


pytestmark = pytest.mark.usefixtures("quick_compile")


# --- the independent reference: one sequence, nothing shared, nothing stacked --------------------------------------


def rms_norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def exact_gelu(x):
    return x * 0.5 * (1 + jax.scipy.special.erf(x / np.sqrt(2)))


def rotary(x, theta):
    """x [S, E]: channels i and i + E/2 are one complex number, turned by position * theta^(-2i/E)."""
    s, e = x.shape
    angle = np.arange(s)[:, None] * theta ** (-np.arange(0, e, 2) / e)
    z = (x[:, : e // 2] + 1j * x[:, e // 2 :]) * np.exp(1j * angle).astype(np.complex64)
    return jnp.concatenate([z.real, z.imag], axis=1)


def softmax_attention(q, k, v, mask=None):
    """One head: q, k, v [S, E]."""
    logits = q @ k.T / np.sqrt(q.shape[1])
    weights = jnp.exp(logits - logits.max(1, keepdims=True)) * (1.0 if mask is None else mask)
    return weights @ v / weights.sum(1, keepdims=True)


def layer_of(p, prefix: str, i: int) -> dict:
    return {name.removeprefix(prefix): a[i] for name, a in p.items() if name.startswith(prefix)}


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def embed_tile(c: VisionConfig, p, pixels):
    """Embeddings [1 + patches, D] of one tile of uint8 pixels [h, w, 3]."""
    image = (pixels / 255.0 - np.array(c.mean, np.float32)) / np.array(c.std, np.float32)
    kernel = p["vision/patch/kernel"].T.reshape(c.width, 3, c.patch_size, c.patch_size)
    maps = jax.lax.conv(image.transpose(2, 0, 1)[None], kernel, (c.patch_size,) * 2, "VALID")[0]
    x = maps.reshape(c.width, -1).T + p["vision/patch/bias"]
    return jnp.concatenate([p["vision/class_embedding"][None], x]) + p["vision/position_embedding"]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def vision_layer(c: VisionConfig, w, x):
    """x [S, D] of one tile."""

    def norm(x, name):
        if c.norm == "rms_norm":
            return rms_norm(x, w[f"{name}/scale"], c.norm_eps)
        return layer_norm(x, w[f"{name}/scale"], w[f"{name}/bias"], c.norm_eps)

    qkv = norm(x, "norm1") @ w["qkv/kernel"] + (w["qkv/bias"] if c.qkv_bias else 0.0)
    q, k, v = qkv[:, : c.width], qkv[:, c.width : 2 * c.width], qkv[:, 2 * c.width :]
    if c.qk_norm:
        q, k = rms_norm(q, w["q_norm/scale"], c.norm_eps), rms_norm(k, w["k_norm/scale"], c.norm_eps)
    e = c.width // c.num_heads
    heads = [softmax_attention(*(y[:, h * e : (h + 1) * e] for y in (q, k, v))) for h in range(c.num_heads)]
    x = x + w["scale1"] * (jnp.concatenate(heads, axis=1) @ w["proj/kernel"] + w["proj/bias"])
    y = exact_gelu(norm(x, "norm2") @ w["fc1/kernel"] + w["fc1/bias"])
    return x + w["scale2"] * (y @ w["fc2/kernel"] + w["fc2/bias"])


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def project_tile(config: ModelConfig, p, x):
    """Visual tokens [V, D] of one tile's hidden states, class token first.

    One visual token is a 2 x 2 block of patches: top left, top right, bottom left, bottom right. The first release
    listed the blocks column by column ("v1"), later ones row by row.
    """
    side = config.vision.image_size // config.vision.patch_size
    grid = x[1:].reshape(side, side, -1)
    blocks = [(i, j) for i in range(0, side, 2) for j in range(0, side, 2)]
    if config.pixel_shuffle == "v1":
        blocks = [(j, i) for i, j in blocks]
    x = jnp.stack([grid[i : i + 2, j : j + 2].reshape(-1) for i, j in blocks])
    x = layer_norm(x, p["projector/norm/scale"], p["projector/norm/bias"], 1e-5)
    x = exact_gelu(x @ p["projector/fc1/kernel"] + p["projector/fc1/bias"])
    return x @ p["projector/fc2/kernel"] + p["projector/fc2/bias"]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def decoder_layer(c: DecoderConfig, w, x):
    """x [S, D] of one whole sequence: prefix and response together, causal."""
    y = rms_norm(x, w["norm1/scale"], c.norm_eps)
    q, k, v = (y @ w[f"{n}/kernel"] + (w[f"{n}/bias"] if c.qkv_bias else 0.0) for n in "qkv")
    causal = np.tril(np.ones((len(x),) * 2))
    heads = []
    for h in range(c.num_heads):
        mine = slice(h * c.head_width, (h + 1) * c.head_width)
        kv = h * c.num_kv_heads // c.num_heads
        shared = slice(kv * c.head_width, (kv + 1) * c.head_width)
        rotated_q, rotated_k = rotary(q[:, mine], c.rope_theta), rotary(k[:, shared], c.rope_theta)
        heads.append(softmax_attention(rotated_q, rotated_k, v[:, shared], causal))
    x = x + jnp.concatenate(heads, axis=1) @ w["o/kernel"]
    y = rms_norm(x, w["norm2/scale"], c.norm_eps)
    gate = y @ w["gate/kernel"]
    return x + (gate / (1 + jnp.exp(-gate)) * (y @ w["up/kernel"])) @ w["down/kernel"]


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def merge_visual(p, tokens, visual, features):
    """Embeddings [S, D] of one sequence: the i-th slot, where `visual`, takes the i-th of its features [T * V, D]."""
    x = p["decoder/embedding"][tokens]
    return jnp.where(visual[:, None], features[jnp.cumsum(visual) - 1], x)


def reference_rewards(p, config: ModelConfig, tokens, visual, lengths, tiles):
    """Rewards [B] of whole sequences [B, S], each encoding its own tiles [B, T, h, w, 3] anew."""
    x = embed_tile(config.vision, p, tiles.reshape(-1, *tiles.shape[2:]))
    for i in range(config.vision.num_layers + 1 + config.select_layer):
        x = vision_layer(config.vision, layer_of(p, "vision/layers/", i), x)
    features = project_tile(config, p, x)
    x = merge_visual(p, tokens, visual, features.reshape(len(tokens), -1, features.shape[-1]))
    for i in range(config.decoder.num_layers):
        x = decoder_layer(config.decoder, layer_of(p, "decoder/layers/", i), x)
    final = x[np.arange(len(x)), np.array(lengths) - 1]
    return rms_norm(final, p["decoder/norm/scale"], config.decoder.norm_eps) @ p["score"]


def reference(p, config: ModelConfig, groups: list[EncodedGroup], weights: np.ndarray):
    """Rewards of all responses, and the gradient of their weighted sum; sequences are padded to one length."""
    rows = [
        (np.concatenate([g.prefixes["primary"].tokens, r]), (g.prefixes["primary"].visual >= 0).nonzero()[0], g.tiles)
        for g in groups
        for r in g.responses
    ]
    s, t, side = max(len(r[0]) for r in rows), max(1, *(len(r[2]) for r in rows)), config.vision.image_size
    tokens, visual = np.zeros((len(rows), s), int), np.zeros((len(rows), s), bool)
    tiles = np.zeros((len(rows), t, side, side, 3), np.float32)
    for i, (row, slots, images) in enumerate(rows):
        tokens[i, : len(row)], visual[i, slots], tiles[i, : len(images)] = row, True, images
    lengths = [len(r[0]) for r in rows]

    def run(p):
        rewards = reference_rewards(p, config, tokens, visual, lengths, tiles)
        return rewards @ weights, rewards

    grads, rewards = jax.grad(run, has_aux=True)(p)
    return np.asarray(rewards), grads


def model_rewards(config: ModelConfig, params: nnx.State, batch: Batch) -> jax.Array:
    model = nnx.merge(abstract_model(config)[0], params)
    return model.rewards(batch.prefixes["primary"], batch.responses, batch.response_lengths)


def groups_for(config: ModelConfig, name: str) -> list[EncodedGroup]:
    rng = np.random.default_rng(5)
    # (tiles, responses): N = 1..5 in one batch with 0-3 tiles; and N = 1 as a batch's own shape
    shapes = [(0, 1), (3, 2), (1, 3), (2, 4), (1, 5)] if name == "qwen" else [(3, 1), (0, 1), (2, 1)]
    return [random_group(config, rng, i, tiles=t, responses=n) for i, (t, n) in enumerate(shapes)]


@pytest.mark.parametrize(("name", "config"), [("qwen", QWEN), ("llama", LLAMA)])
def test_two_streams_equal_one_causal_forward_per_response(name: str, config: ModelConfig) -> None:
    params, groups, rng = random_params(config, 1), groups_for(config, name), np.random.default_rng(2)
    weights = rng.normal(size=sum(len(g.responses) for g in groups)).astype(np.float32)
    want, want_grads = reference(flat(params), config, groups, weights)
    assert np.ptp(want) > 0.5  # rewards differ,
    assert all(np.any(g) for g in want_grads.values())  # and no gradient agrees by being zero

    tight = one_micro(make_batch(groups, config))
    rewards = jax.jit(functools.partial(model_rewards, config))(params, tight)
    np.testing.assert_allclose(rewards[tight.response_lengths > 0], want, rtol=0, atol=TOLERANCE)

    # The group without tiles, as the branch that has no image at all sees it.
    alone = next(i for i, g in enumerate(groups) if len(g.tiles) == 0)
    first = sum(len(g.responses) for g in groups[:alone])
    absent = one_micro(make_batch(groups[alone : alone + 1], config, views={"primary": "absent"}))
    assert absent.prefixes["primary"].pixels is None
    rewards = jax.jit(functools.partial(model_rewards, config))(params, absent)
    np.testing.assert_allclose(rewards[0], want[first : first + len(groups[alone].responses)], rtol=0, atol=TOLERANCE)

    # The same groups in a batch that is too large in every dimension, with random tokens as padding.
    batch = one_micro(make_batch(groups, config, num_groups=len(groups) + 2, extra=2))
    batch = scribble(batch, rng, config.decoder.vocab_size)
    valid = batch.response_lengths > 0
    spread = np.zeros(valid.shape, np.float32)
    spread[valid] = weights

    def weighted_sum(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rewards = model_rewards(config, params, batch)
        return jnp.sum(rewards * spread), rewards

    grads, rewards = jax.jit(jax.grad(weighted_sum, has_aux=True))(params, batch)
    np.testing.assert_allclose(rewards[valid], want, rtol=0, atol=TOLERANCE)
    errors = relative_errors(flat(grads), want_grads)
    assert max(errors.values()) < TOLERANCE, sorted(errors.items(), key=lambda e: -e[1])[:5]


# --- the authors' numbers -------------------------------------------------------------------------------------------

IMG_CONTEXT = 152


def golden_batch(inputs: dict[str, np.ndarray], config: ModelConfig) -> Batch:
    """The collator's batch of three comparisons as groups of two responses, split where chosen and rejected part."""

    def conversation(suffix: str, i: int) -> tuple[Conversation, list[np.ndarray]]:
        sides = []
        for side in ("chosen", "rejected"):
            tokens, mask = inputs[f"input_ids_{side}{suffix}"][i], inputs[f"attention_mask_{side}{suffix}"][i]
            sides.append(tokens[: mask.sum()].astype(np.int32))
        shortest = min(map(len, sides))
        apart = np.flatnonzero(np.not_equal(*(s[:shortest] for s in sides)))
        cut = min(apart[0] if len(apart) else shortest, shortest - 1)
        is_visual = sides[0][:cut] == IMG_CONTEXT
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
    return one_micro(make_batch(groups, config, views={"primary": "multimodal", "proxy": "blank"}, extra=1))


@pytest.mark.parametrize("name", ["A_qwen2", "A_llama"])
def test_rewards_losses_and_gradients_are_the_authors(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "goldens" / name
    inputs, outputs = (dict(np.load(folder / f"{f}.npz")) for f in ("inputs", "outputs"))
    meta = json.loads((folder / "meta.json").read_text())
    config = read_config(folder)
    init = random_params(config, 0)
    primary, initialised = load_params(folder, config, init)
    assert initialised == []
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "model.safetensors").symlink_to(folder / "proxy.safetensors")
    params = {"primary": primary, "proxy": load_params(tmp_path / "proxy", config, init)[0]}
    graphdef, _ = abstract_model(config)
    batch = golden_batch(inputs, config)
    valid = batch.comparisons.mask

    @jax.jit
    def run(params, batch, margin):
        comparisons = batch.comparisons

        def losses(params):
            rewards = branch_rewards(graphdef, params, nnx.State({}), batch, jnp.dtype("float32"))
            d = {b: margins(r, comparisons) for b, r in rewards.items()}
            robust = shortcut_aware.terms(d, comparisons)
            alone = {"primary": d["primary"]}
            plain = standard.terms(alone, comparisons).loss
            with_margin = standard.terms(alone, dataclasses.replace(comparisons, margin=margin)).loss
            means = [
                jnp.sum(x * comparisons.mask) / jnp.sum(comparisons.mask) for x in (robust.loss, plain, with_margin)
            ]
            return tuple(means), (rewards, d, robust)

        means, vjp, (rewards, d, robust) = jax.vjp(losses, params, has_aux=True)
        return means, rewards, d, robust.sfc, vjp((1.0, 0.0, 0.0))[0], vjp((0.0, 1.0, 0.0))[0]

    margin = np.zeros(valid.shape, np.float32)
    margin[valid] = outputs["margin"]
    (robust, plain, with_margin), rewards, d, sfc, grads, standard_grads = run(params, batch, margin)

    for branch, theirs in (("primary", "main"), ("proxy", "bias")):
        want = np.concatenate([outputs[f"rewards_{side}_{theirs}"] for side in ("chosen", "rejected")], axis=1)
        np.testing.assert_allclose(rewards[branch][:3, :2], want, atol=TOLERANCE)
        np.testing.assert_allclose(d[branch][valid], outputs[f"{theirs}_logit_diff"][:, 0], atol=TOLERANCE)
    np.testing.assert_allclose(sfc[valid], outputs["scale_1"][:, 0], atol=TOLERANCE)
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


@pytest.mark.parametrize("name", ["ln", "rms"])
def test_visual_features_are_the_authors(name: str, shared: Path, tmp_path: Path) -> None:
    """Both tower styles, both pixel shuffles, both selected layers, from the tower's own checkpoint files."""
    folder = shared / "goldens" / "A_vision_variants"
    v = json.loads((folder / f"vision_config_{name}.json").read_text())
    vision = VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        width=v["hidden_size"],
        mlp_width=v["intermediate_size"],
        num_layers=v["num_hidden_layers"],
        num_heads=v["num_attention_heads"],
        norm=v["norm_type"],
        norm_eps=v["layer_norm_eps"],
        qkv_bias=v["qkv_bias"],
        qk_norm=v["qk_normalization"],
    )
    data = np.load(folder / "data.npz")
    width = data[f"{name}.features_56_psv1_layer-1"].shape[-1]
    config = ModelConfig(vision=vision, decoder=dataclasses.replace(DECODER, width=width))
    init = random_params(config, 0)
    save_params(tmp_path, config, init)
    tensors = load_file(tmp_path / "model.safetensors") | load_file(folder / f"vision_{name}.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    params, _ = load_params(tmp_path, config, init)
    # The file holds noise that comes from no uint8 image, so it goes in behind the normalisation.
    values = data["pixel_values_56"].transpose(0, 2, 3, 1)
    variants = [(shuffle, layer) for shuffle in ("v1", "v2") for layer in (-1, -2)]

    @jax.jit
    def run(params):
        features = []
        for shuffle, layer in variants:
            one = dataclasses.replace(config, pixel_shuffle=shuffle, select_layer=layer)
            model = nnx.merge(abstract_model(one)[0], params)
            features.append(model.visual_features(jnp.zeros((2, 1, 56, 56, 3), jnp.uint8), jnp.dtype("float32")))
        return features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmrm_jax.models.vision.normalise_pixels", lambda pixels, config: jnp.asarray(values))
        features = run(params)
    for (shuffle, layer), got in zip(variants, features):
        want = data[f"{name}.features_56_ps{shuffle}_layer{layer}"]
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
