"""The published models, traced without memory: their parameters counted and laid out on meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmrm_jax.config import MeshConfig, ModelConfig
from mmrm_jax.models.hf.config import config_from_hf, config_to_hf
from mmrm_jax.models.sizes import INTERNVL2
from mmrm_jax.sharding import make_mesh, param_shardings
from mmrm_jax.train.state import abstract_model
from mmrm_jax.types import Prefix, Responses

# Parameters of the published checkpoints, LM head included. Those of 2B, 8B and 26B are the hub's own counts of the
# safetensors files (of InternVL2.5, whose shapes at these sizes are the same). Those of 1B and 4B, which the hub shows
# as 938 M and 4.15 B, follow from their config.json by `count` below; it gives the other three exactly, and also
# InternVL2.5-1B's 938193024, whose vocabulary has 151674 entries.
PUBLISHED = {"1B": 938158976, "2B": 2205754368, "4B": 4146855936, "8B": 8075365376, "26B": 25514186112}
by_size = pytest.mark.parametrize(("name", "config"), INTERNVL2.items())


def count(config: ModelConfig) -> int:
    """By hand, without score and LM head."""
    v, d = config.vision, config.decoder
    norm = v.width * (2 if v.norm == "layer_norm" else 1)
    attention = 4 * v.width**2 + v.width * (1 + 3 * v.qkv_bias + 2 * v.qk_norm)
    mlp = 2 * v.width * v.mlp_width + v.mlp_width + v.width
    tower = v.num_layers * (2 * norm + attention + mlp + 2 * v.width)
    embeddings = v.width * (1 + 1 + (v.image_size // v.patch_size) ** 2 + 3 * v.patch_size**2 + 1)
    projector = 2 * 4 * v.width + 4 * v.width * d.width + d.width + d.width**2 + d.width
    heads = (d.num_heads + 2 * d.num_kv_heads) * d.head_width
    layer = d.width * heads + heads * d.qkv_bias + d.num_heads * d.head_width * d.width
    layer += 2 * d.width + 3 * d.width * d.mlp_width
    return tower + embeddings + projector + d.vocab_size * d.width + d.num_layers * layer + d.width


@by_size
def test_parameters_are_as_many_as_published(name: str, config: ModelConfig) -> None:
    sizes = [x.size for x in jax.tree.leaves(abstract_model(config)[1])]
    width, vocab = config.decoder.width, config.decoder.vocab_size
    assert sum(sizes) - width == count(config)
    assert sum(sizes) - width + vocab * width == PUBLISHED[name]
    assert config_from_hf(config_to_hf(config, template="", max_tiles=6)) == config


@by_size
def test_the_forward_traces(name: str, config: ModelConfig) -> None:
    assert config.visual_tokens_per_tile == 256
    graphdef, params = abstract_model(config)

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    pixels = jax.ShapeDtypeStruct((2, 7, 448, 448, 3), jnp.uint8)
    prefix = Prefix(i32(2, 2048), i32(2), i32(2, 2048), pixels)
    rewards = jax.eval_shape(
        lambda p, *args: nnx.merge(graphdef, p).rewards(*args, jnp.dtype("bfloat16")),
        params,
        prefix,
        Responses(i32(2, 4, 512), i32(2, 4, 512), i32(2, 4), i32(2)),
    )
    assert (rewards.shape, rewards.dtype) == ((2, 4), np.dtype("float32"))


@by_size
def test_every_parameter_divides_by_a_mesh_of_eight(name: str, config: ModelConfig) -> None:
    params = abstract_model(config)[1]
    shardings = param_shardings(params, make_mesh(MeshConfig(data=1, fsdp=8, tensor=1)))
    parts = [s.shard_shape(v.get_value().shape) for s, v in zip(jax.tree.leaves(shardings), variables(params))]
    whole = sum(v.get_value().size for v in variables(params))
    # Norms, biases and the head are whole on every device; all else is not.
    assert sum(int(np.prod(p)) for p in parts) < whole / 8 * 1.01


def variables(params: nnx.State) -> list[nnx.Variable]:
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
