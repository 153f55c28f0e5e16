"""bfloat16 compute: rewards near those of float32, and float32 where rounding would make ties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from test_hf import VARIANTS
from tiny_models import MODEL, flat, make_batch, one_micro, random_group, random_params

from mmrm_jax.config import MeshConfig, ModelConfig
from mmrm_jax.eval.scorer import make_score_step
from mmrm_jax.models.decoder import look_up
from mmrm_jax.models.hf.weights import load_params, save_params
from mmrm_jax.models.layers import Linear
from mmrm_jax.objectives import standard
from mmrm_jax.sharding import make_mesh
from mmrm_jax.train.state import abstract_model
from mmrm_jax.train.step import make_eval_step
from mmrm_jax.types import Batch, Comparison

EPSILON = 2.0**-8  # of one rounding to bfloat16


def batch_of(config: ModelConfig, groups: int, responses: int = 4) -> Batch:
    rng = np.random.default_rng(0)
    pairs = [Comparison(0, 1), Comparison(2, 3)]
    made = [random_group(config, rng, i, tiles=1, responses=responses, comparisons=pairs) for i in range(groups)]
    return one_micro(make_batch(made, config, views={"primary": "multimodal"}))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_loaded_models_score_alike(name: str, saved: str, tmp_path) -> None:
    config = VARIANTS[name]
    save_params(tmp_path, config, random_params(config, 1), dtype=saved)
    params, _ = load_params(tmp_path, config, abstract_model(config)[1])
    batch = batch_of(config, 6)
    exact, rounded = (np.asarray(make_score_step(config, dtype)(params, batch)) for dtype in ("float32", "bfloat16"))
    assert exact.dtype == rounded.dtype == np.float32
    # Dozens of roundings, in random directions, of values as large as the rewards themselves.
    error = np.sqrt(np.mean((exact - rounded) ** 2)) / np.std(exact)
    assert EPSILON / 16 < error < 8 * EPSILON
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.999


def test_rewards_that_are_nearly_equal_are_no_tie() -> None:
    """The head is large beside what tells responses apart: in bfloat16 most rewards would be one and the same."""
    params = random_params(MODEL, 1)
    # One channel of every token is so large that the last norm makes it the same for all, and the head weighs it most.
    params["decoder"]["norm"]["scale"] = nnx.Param(jnp.ones(16))
    params["decoder"]["embedding"] = nnx.Param(params["decoder"]["embedding"].get_value().at[:, 0].set(300.0))
    params["score"] = nnx.Param(jnp.ones(16).at[0].set(100.0))
    batch = batch_of(MODEL, 8)
    step = make_eval_step(abstract_model(MODEL)[0], standard(), jnp.dtype("bfloat16"))
    out = jax.jit(step)({"primary": params}, nnx.State({}), batch)
    rewards = np.asarray(out["primary/rewards"])[:, :3]  # the fourth response repeats the third
    margins = np.asarray(out["primary/margins"])
    assert rewards.dtype == margins.dtype == np.float32
    assert np.abs(rewards - rewards.mean()).max() < 4 * EPSILON * rewards.mean()
    assert len(np.unique(rewards)) == rewards.size
    assert len(np.unique(rewards.astype(ml_dtypes.bfloat16))) < rewards.size / 2
    # Margins are differences of those rewards, to the last bit.
    flat = np.asarray(out["primary/rewards"]).ravel()
    index = batch.comparisons.index[batch.comparisons.mask]
    np.testing.assert_array_equal(margins, flat[index[:, 0]] - flat[index[:, 1]])
    assert np.count_nonzero(margins[0::2]) == 8 and np.all(margins[1::2] == 0)


def test_gradients_of_a_frequent_token_are_summed_in_float32() -> None:
    """In bfloat16 a sum stops growing at 256 times what is added."""
    times, exact = 4096, 0.01
    table, tokens = jnp.zeros((3, 2)), jnp.asarray([0] * times + [2])
    found = jax.grad(lambda t: jnp.sum(look_up(t, tokens, jnp.dtype("bfloat16"))) * exact)(table)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[times * exact] * 2, [0, 0], [exact] * 2], rtol=EPSILON)


def test_gradients_of_biases_are_summed_in_float32() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        graphdef, params = nnx.split(Linear((4, 4), (None, None), bias=True, rngs=nnx.Rngs(0)))
    x = jnp.zeros((32_768, 4), jnp.bfloat16)
    found = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x).astype(jnp.float32)))(params)
    np.testing.assert_array_equal(found["bias"][...], np.full(4, 32_768.0))  # a sum in bfloat16 gives half of it


def test_gradients_in_bfloat16_are_near_those_in_float32() -> None:
    params, batch = random_params(MODEL, 1), jax.tree.map(jnp.asarray, batch_of(MODEL, 8))
    graphdef = abstract_model(MODEL)[0]

    def loss(params: nnx.State, dtype: str) -> jax.Array:
        rewards = nnx.merge(graphdef, params).rewards(batch.prefixes["primary"], batch.responses, jnp.dtype(dtype))
        return jnp.sum(jnp.where(jnp.asarray(batch.responses.last) >= 0, jnp.sin(rewards), 0))

    exact, rounded = (
        flat(jax.jit(jax.grad(loss), static_argnums=1)(params, dtype)) for dtype in ("float32", "bfloat16")
    )
    for name, wanted in exact.items():
        assert rounded[name].dtype == jnp.float32, name
        # A bias of keys moves all scores of a query alike: its gradient is 0 but for rounding.
        size = np.linalg.norm(exact[name.replace("/k/bias", "/k/kernel")])
        assert np.linalg.norm(np.asarray(rounded[name]) - wanted) <= 0.1 * size, name
