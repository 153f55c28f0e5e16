"""Tiny random models and ragged random batches that several test files share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrm_jax.config import DecoderConfig, ModelConfig, TrainConfig, VisionConfig
from mmrm_jax.data.batching import EncodedGroup, collate
from mmrm_jax.data.buckets import BatchShape, Buckets
from mmrm_jax.data.packing import row_length
from mmrm_jax.data.text import Conversation
from mmrm_jax.train.program import build_program
from mmrm_jax.train.state import abstract_model
from mmrm_jax.types import Batch, Comparison, Responses

# Every sharded dimension divides by 8: these fit any mesh over eight devices.
VISION = VisionConfig(image_size=8, patch_size=2, width=8, mlp_width=16, num_layers=1, num_heads=2)
DECODER = DecoderConfig(
    vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2, head_width=4, rope_theta=1e4
)
MODEL = ModelConfig(vision=VISION, decoder=DECODER)


def flat(params: nnx.State) -> dict[str, Any]:
    """Parameters by path, "decoder/layers/q/kernel"."""
    return {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(params)}


def random_params(config: ModelConfig, seed: int) -> nnx.State:
    """Random values in every parameter: freshly initialised biases and scales would hide a term that is left out."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = next(str(k.key) for k in reversed(path) if isinstance(k, jax.tree_util.DictKey))
        noise = rng.normal(size=x.shape)
        if name == "kernel":
            value = noise * x.shape[-2] ** -0.5
        elif name == "scale":
            value = 1 + 0.2 * noise
        else:
            value = noise * {"embedding": 1.0, "score": x.shape[0] ** -0.5, "bias": 0.2}.get(name, 0.5)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_model(config)[1])


def conversation(config: ModelConfig, rng: np.random.Generator, length: int, visual_tokens: int) -> Conversation:
    """A prefix of `length` text tokens with its visual tokens in the middle, in two runs."""
    tokens = rng.integers(config.decoder.vocab_size, size=length + visual_tokens).astype(np.int32)
    visual = np.full(length + visual_tokens, -1, np.int32)
    first = visual_tokens // 3
    visual[1 : 1 + first] = np.arange(first)
    visual[2 + first : 2 + visual_tokens] = np.arange(first, visual_tokens)
    return Conversation(tokens, visual)


def random_group(
    config: ModelConfig,
    rng: np.random.Generator,
    index: int,
    *,
    tiles: int,
    responses: int,
    comparisons: Sequence[Comparison] = (),
    proxy_tiles: int = 0,
) -> EncodedGroup:
    """A group with ragged lengths; its second response, if any, begins the first, and the fourth equals the third."""
    side, per_tile = config.vision.image_size, config.visual_tokens_per_tile
    texts = [
        rng.integers(config.decoder.vocab_size, size=rng.integers(2, 8)).astype(np.int32) for _ in range(responses)
    ]
    if responses > 1:
        texts[1] = texts[0][: int(rng.integers(1, len(texts[0])))]
    if responses > 3:
        texts[3] = texts[2]
    return EncodedGroup(
        index,
        {
            "primary": conversation(config, rng, int(rng.integers(3, 9)), tiles * per_tile),
            "proxy": conversation(config, rng, int(rng.integers(3, 9)), proxy_tiles * per_tile),
        },
        tuple(texts),
        rng.integers(256, size=(tiles, side, side, 3)).astype(np.uint8),
        tuple(comparisons),
    )


def make_batch(
    groups: Sequence[EncodedGroup],
    config: ModelConfig,
    *,
    num_groups: int | None = None,
    micro_batches: int = 1,
    views: Mapping[str, str] | None = None,
    extra: int = 0,
    rows: int | None = None,
    blank: np.ndarray | None = None,
) -> Batch:
    """A batch [M, ...] just large enough for `groups`, or `extra` larger in every padded dimension.

    Responses are packed into `rows` rows a group; by default there is one for each. `blank` is `collate`'s.
    """
    rows = max(len(g.responses) for g in groups) + extra if rows is None else rows
    views = {"primary": "multimodal", "proxy": "absent"} if views is None else views
    shape = BatchShape(
        prefixes={b: max(len(g.prefixes[b].tokens) for g in groups) + extra for b in views},
        rows=(rows, max(row_length(g.shape.responses, rows) for g in groups) + extra),
        tiles=max(len(g.tiles) for g in groups if g.tiles is not None) + extra,
    )
    buckets = Buckets(
        shapes=(shape,),
        responses=max(len(g.responses) for g in groups) + extra,
        comparisons=max(1, *(len(g.comparisons) for g in groups)) + extra,
        image_size=config.vision.image_size,
    )
    num_groups = len(groups) if num_groups is None else num_groups
    return collate(
        groups,
        buckets,
        num_groups=num_groups,
        micro_batches=micro_batches,
        views=views,
        blank=blank,
        given=sorted(groups[0].given),
    )


def compile_train_step(model: ModelConfig, config: TrainConfig, batch: Batch) -> jax.stages.Compiled:
    """The train step of a run on its mesh, compiled from shapes and shardings alone."""
    program = build_program(model, config, 10)
    state = jax.eval_shape(lambda params: program.init(params, config), abstract_model(model)[1])
    leaves, treedef = jax.tree.flatten(state)
    placed = zip(leaves, jax.tree.leaves(program.shardings), strict=True)
    state = treedef.unflatten([jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in placed])
    with jax.set_mesh(program.mesh):
        return program.train_step.__wrapped__.lower(state, program.put(batch)).compile()


def one_micro(batch: Batch) -> Batch:
    """The only micro-batch, without its leading axis."""
    assert batch.group_index.shape[0] == 1
    return jax.tree.map(lambda x: x[0], batch)


def scribble(batch: Batch, rng: np.random.Generator, vocab_size: int) -> Batch:
    """The same batch with random tokens where it is padded."""

    def fill(tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return np.where(valid, tokens, rng.integers(vocab_size, size=tokens.shape).astype(np.int32))

    prefixes = {
        b: dataclasses.replace(p, tokens=fill(p.tokens, np.arange(p.tokens.shape[-1]) < p.lengths[..., None]))
        for b, p in batch.prefixes.items()
    }
    responses = dataclasses.replace(batch.responses, tokens=fill(batch.responses.tokens, is_response(batch.responses)))
    return dataclasses.replace(batch, prefixes=prefixes, responses=responses)


def is_response(responses: Responses) -> np.ndarray:
    """Which tokens [..., K, L] belong to a response, worked out from where responses end and how long they are."""
    positions, last = np.asarray(responses.positions), np.asarray(responses.last)
    valid = np.zeros((int(np.prod(positions.shape[:-2])), int(np.prod(positions.shape[-2:]))), bool)
    flat = positions.reshape(valid.shape)
    for g, ends in enumerate(last.reshape(len(valid), -1)):
        for end in ends[ends >= 0]:
            valid[g, end - flat[g, end] : end + 1] = True
    return valid.reshape(positions.shape)


def relative_errors(got: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, float]:
    """Per parameter, the largest difference relative to the largest entry of `want` (0 where both are all zero)."""
    assert got.keys() == want.keys()
    errors = {}
    for name in want:
        a, b = np.asarray(got[name], np.float64), np.asarray(want[name], np.float64)
        assert a.shape == b.shape, name
        difference, size = np.abs(a - b).max(), np.abs(b).max()
        errors[name] = 0.0 if difference == 0 else float(difference / size) if size else float("inf")
    return errors


def with_numbers(groups: Sequence[EncodedGroup]) -> list[EncodedGroup]:
    """The groups with the numbers of their comparisons, as `EncodedSource.with_numbers` counts them."""
    ends = np.cumsum([len(g.comparisons) for g in groups])
    numbers = np.split(np.arange(ends[-1], dtype=np.float32), ends[:-1])
    return [dataclasses.replace(g, given={**g.given, "number": n}) for g, n in zip(groups, numbers, strict=True)]
