"""The two-stream forward against an ordinary causal forward per response."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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

from mmrm_jax.config import DecoderConfig, DynamicRope, LongRope, ModelConfig, VisionConfig
from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.train.state import abstract_model
from mmrm_jax.types import Batch

# Tolerance on rewards: absolute, since they are of order 1. On gradients: relative to the largest entry of the same
# parameter's gradient, the strictest choice that still means something in float32, where small entries are sums
# of large terms that cancel.
TOLERANCE = 1e-5

# Between them: both norms, with and without biases and q/k norm, both pixel shuffles, both selected layers, grouped and
# ordinary attention, unrolled and scanned layers.
QWEN = ModelConfig(vision=dataclasses.replace(VISION, num_layers=2), decoder=DECODER)
LLAMA = ModelConfig(
    vision=dataclasses.replace(VISION, num_layers=3, norm="rms_norm", qkv_bias=False, qk_norm=True),
    decoder=dataclasses.replace(DECODER, family="llama", num_layers=5, num_kv_heads=4, qkv_bias=False, norm_eps=1e-5),
    pixel_shuffle="v1",
    select_layer=-2,
)
SMALL = ModelConfig(vision=VISION, decoder=DECODER)
INTERNLM2 = dataclasses.replace(
    SMALL,
    decoder=dataclasses.replace(
        DECODER, family="internlm2", o_bias=True, head_width=8, rope_scaling=DynamicRope(2.0, max_length=12)
    ),
)
PHI3 = dataclasses.replace(
    SMALL,
    decoder=dataclasses.replace(
        DECODER,
        family="phi3",
        num_kv_heads=4,
        qkv_bias=False,
        rope_scaling=LongRope((1.0, 1.5), (2.0, 9.0), original_length=15, max_length=120),
    ),
)
QWEN3 = dataclasses.replace(
    SMALL, decoder=dataclasses.replace(DECODER, family="qwen3", qkv_bias=False, qk_norm=True, head_width=8)
)
CONFIGS = {"qwen": QWEN, "llama": LLAMA, "internlm2": INTERNLM2, "phi3": PHI3, "qwen3": QWEN3}


# --- the independent reference: one sequence, nothing shared, nothing stacked --------------------------------------


def rms_norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def exact_gelu(x):
    return x * 0.5 * (1 + jax.scipy.special.erf(x / np.sqrt(2)))


def rotary(x, frequencies):
    """x [S, E]: channels i and i + E/2 are one complex number, turned by position * frequency i."""
    s, e = x.shape
    angle = jnp.arange(s)[:, None] * frequencies[None]
    z = (x[:, : e // 2] + 1j * x[:, e // 2 :]) * (jnp.cos(angle) + 1j * jnp.sin(angle))
    return jnp.concatenate([z.real, z.imag], axis=1)


def frequencies_of(c: DecoderConfig, length: int) -> np.ndarray:
    """theta^(-2i/E), scaled as the conversation's length says."""
    e, theta = c.head_width, c.rope_theta
    match c.rope_scaling:
        case DynamicRope(factor, max_length) if length > max_length:
            theta *= (factor * length / max_length - (factor - 1)) ** (e / (e - 2))
            return theta ** (-np.arange(0, e, 2) / e)
        case LongRope() as rope:
            factors = rope.long_factors if length > rope.original_length else rope.short_factors
            return theta ** (-np.arange(0, e, 2) / e) / np.array(factors)
        case _:
            return theta ** (-np.arange(0, e, 2) / e)


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

    y = norm(x, "norm1")
    q, k, v = (y @ w[f"{n}/kernel"] + (w[f"{n}/bias"] if c.qkv_bias else 0.0) for n in "qkv")
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
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0))
def decoder_layer(c: DecoderConfig, w, x, frequencies):
    """x [S, D] of one whole sequence: prefix and response together, causal."""
    y = rms_norm(x, w["norm1/scale"], c.norm_eps)
    q, k, v = (y @ w[f"{n}/kernel"] + (w[f"{n}/bias"] if c.qkv_bias else 0.0) for n in "qkv")
    causal = np.tril(np.ones((len(x),) * 2))
    heads = []
    for h in range(c.num_heads):
        mine = slice(h * c.head_width, (h + 1) * c.head_width)
        kv = h * c.num_kv_heads // c.num_heads
        shared = slice(kv * c.head_width, (kv + 1) * c.head_width)
        mine_q, shared_k = q[:, mine], k[:, shared]
        if c.qk_norm:
            mine_q = rms_norm(mine_q, w["q_norm/scale"], c.norm_eps)
            shared_k = rms_norm(shared_k, w["k_norm/scale"], c.norm_eps)
        stretch = c.rope_scaling.scale if isinstance(c.rope_scaling, LongRope) else 1.0
        rotated_q, rotated_k = stretch * rotary(mine_q, frequencies), stretch * rotary(shared_k, frequencies)
        heads.append(softmax_attention(rotated_q, rotated_k, v[:, shared], causal))
    x = x + jnp.concatenate(heads, axis=1) @ w["o/kernel"] + (w["o/bias"] if c.o_bias else 0.0)
    y = rms_norm(x, w["norm2/scale"], c.norm_eps)
    gate = y @ w["gate/kernel"]
    return x + (gate / (1 + jnp.exp(-gate)) * (y @ w["up/kernel"])) @ w["down/kernel"]


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def merge_visual(p, tokens, visual, features):
    """Embeddings [S, D] of one sequence: the i-th slot, where `visual`, takes the i-th of its features [T * V, D]."""
    x = p["decoder/embedding"][tokens]
    return jnp.where(visual[:, None], features[jnp.cumsum(visual) - 1], x)


def reference_rewards(p, config: ModelConfig, tokens, visual, lengths, tiles, frequencies):
    """Rewards [B] of whole sequences [B, S], each encoding its own tiles [B, T, h, w, 3] anew."""
    x = embed_tile(config.vision, p, tiles.reshape(-1, *tiles.shape[2:]))
    for i in range(config.vision.num_layers + 1 + config.select_layer):
        x = vision_layer(config.vision, layer_of(p, "vision/layers/", i), x)
    features = project_tile(config, p, x)
    x = merge_visual(p, tokens, visual, features.reshape(len(tokens), -1, features.shape[-1]))
    for i in range(config.decoder.num_layers):
        x = decoder_layer(config.decoder, layer_of(p, "decoder/layers/", i), x, frequencies)
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
    # Where frequencies depend on the length, all of a group go by its longest conversation.
    longest = [len(g.prefixes["primary"].tokens) + max(map(len, g.responses)) for g in groups for _ in g.responses]
    frequencies = np.stack([frequencies_of(config.decoder, length) for length in longest]).astype(np.float32)

    def run(p):
        rewards = reference_rewards(p, config, tokens, visual, lengths, tiles, frequencies)
        return rewards @ weights, rewards

    grads, rewards = jax.grad(run, has_aux=True)(p)
    return np.asarray(rewards), grads


def model_rewards(config: ModelConfig, params: nnx.State, batch: Batch) -> jax.Array:
    model = nnx.merge(abstract_model(config)[0], params)
    return model.rewards(batch.prefixes["primary"], batch.responses)


def groups_for(config: ModelConfig, name: str) -> list[EncodedGroup]:
    rng = np.random.default_rng(5)
    # (tiles, responses): N = 1..5 in one batch with 0-3 tiles; and N = 1 as a batch's own shape
    shapes = [(0, 1), (3, 2), (1, 3), (2, 4), (1, 5)] if name != "llama" else [(3, 1), (0, 1), (2, 1)]
    return [random_group(config, rng, i, tiles=t, responses=n) for i, (t, n) in enumerate(shapes)]


@pytest.mark.parametrize(("name", "config"), CONFIGS.items())
def test_two_streams_equal_one_causal_forward_per_response(name: str, config: ModelConfig) -> None:
    params, groups, rng = random_params(config, 1), groups_for(config, name), np.random.default_rng(2)
    weights = rng.normal(size=sum(len(g.responses) for g in groups)).astype(np.float32)
    want, want_grads = reference(flat(params), config, groups, weights)
    assert np.ptp(want) > 0.5  # rewards differ,
    assert all(np.any(g) for g in want_grads.values())  # and no gradient agrees by being zero

    tight = one_micro(make_batch(groups, config))
    rewards = jax.jit(functools.partial(model_rewards, config))(params, tight)
    np.testing.assert_allclose(rewards[tight.responses.last >= 0], want, rtol=0, atol=TOLERANCE)

    # Responses that share rows: all in one, and some in each of two.
    for rows in (1, 2):
        packed = scribble(one_micro(make_batch(groups, config, rows=rows, extra=1)), rng, config.decoder.vocab_size)
        assert packed.responses.tokens.shape[1] == rows
        grads, rewards = jax.jit(jax.grad(weighted(config, packed, weights), has_aux=True))(params, packed)
        np.testing.assert_allclose(rewards[packed.responses.last >= 0], want, rtol=0, atol=TOLERANCE)
        check_gradients(config, grads, want_grads)

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
    grads, rewards = jax.jit(jax.grad(weighted(config, batch, weights), has_aux=True))(params, batch)
    np.testing.assert_allclose(rewards[batch.responses.last >= 0], want, rtol=0, atol=TOLERANCE)
    check_gradients(config, grads, want_grads)


def weighted(config: ModelConfig, batch: Batch, weights: np.ndarray):
    """(params, batch) -> (the weighted sum of this batch's rewards, all of them)."""
    valid = batch.responses.last >= 0
    spread = np.zeros(valid.shape, np.float32)
    spread[valid] = weights

    def weighted_sum(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rewards = model_rewards(config, params, batch)
        return jnp.sum(rewards * spread), rewards

    return weighted_sum


def check_gradients(config: ModelConfig, grads: nnx.State, want: dict[str, jax.Array]) -> None:
    found, want = flat(grads), dict(want)
    if config.vision.qkv_bias:  # one bias on all keys adds the same to all logits of a query: softmax does not see it
        assert all(np.abs(side.pop("vision/layers/k/bias")).max() < TOLERANCE for side in (found, want))
    errors = relative_errors(found, want)
    assert max(errors.values()) < TOLERANCE, sorted(errors.items(), key=lambda e: -e[1])[:5]


@pytest.mark.parametrize("name", ["internlm2", "phi3"])
def test_length_dependent_rope_changes_with_a_groups_longest_conversation_alone(name: str) -> None:
    """The thresholds above lie among the groups' lengths, so both regimes are met; and what crosses them matters."""
    config, rng = CONFIGS[name], np.random.default_rng(3)
    params, group = (
        random_params(config, 1),
        random_group(CONFIGS[name], np.random.default_rng(3), 0, tiles=0, responses=2),
    )
    rope = config.decoder.rope_scaling
    threshold = rope.max_length if isinstance(rope, DynamicRope) else rope.original_length
    short, long = (rng.integers(32, size=n).astype(np.int32) for n in (2, threshold + 20))
    split = len(group.prefixes["primary"].tokens)
    assert split + 2 <= threshold

    def first_reward(responses: tuple[np.ndarray, ...], **options) -> float:
        batch = one_micro(make_batch([dataclasses.replace(group, responses=responses)], config, **options))
        return float(jax.jit(functools.partial(model_rewards, config))(params, batch)[0, 0])

    alone = first_reward((short,))
    assert first_reward((short,), extra=40) == pytest.approx(alone, abs=1e-6)  # padding crosses the threshold
    assert first_reward((short, short)) == pytest.approx(alone, abs=1e-6)
    beside = first_reward((short, long))
    assert abs(beside - alone) > 1e-3
    assert first_reward((short, long), extra=9) == pytest.approx(beside, abs=1e-6)
