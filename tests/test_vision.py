"""Drop path, drawn per group and tile, and bicubic weights by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import MODEL, make_batch, one_micro, random_group, random_params

from mmrm_jax.config import BranchInput, TrainConfig
from mmrm_jax.models.vision import cubic_weights, drop_path
from mmrm_jax.sharding import make_mesh
from mmrm_jax.train.program import build_program
from mmrm_jax.train.state import abstract_model
from mmrm_jax.train.step import branch_rewards, drop_path_keys
from mmrm_jax.types import Comparison

CONFIG = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, num_layers=3, drop_path_rate=0.5))


def groups(count: int = 4, proxy_tiles: int = 0) -> list:
    rng = np.random.default_rng(0)
    return [
        random_group(
            CONFIG, rng, i, tiles=1 + i % 3, responses=2, comparisons=(Comparison(0, 1),), proxy_tiles=proxy_tiles
        )
        for i in range(count)
    ]


def test_rates_of_nothing_or_everything_raise() -> None:
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"drop_path_rate is .* below 1"):
            TrainConfig(drop_path_rate=wrong)


def test_bicubic_weights_by_hand() -> None:
    np.testing.assert_array_equal(cubic_weights(5, 5), np.eye(5))
    # Halving: every new centre lies midway between two old ones, at distances 1/2 and 3/2 from its four neighbours:
    # (a + 2) / 8 - (a + 3) / 4 + 1 = 19/32 and a (27 / 8 - 45 / 4 + 12 - 4) = -3/32, edges counted again.
    want = np.array([[16, 19, -3, 0], [0, -3, 19, 16]]) / 32
    np.testing.assert_allclose(cubic_weights(4, 2), want, atol=1e-7)
    for old, new in ((4, 7), (32, 16), (16, 32), (3, 1)):
        np.testing.assert_allclose(cubic_weights(old, new).sum(axis=1), 1, atol=1e-6)


def test_drop_path_rates_grow_linearly_and_keep_the_mean() -> None:
    keep = np.asarray(drop_path(0.5, 3, jax.random.split(jax.random.key(0), 4000)))
    assert keep.shape == (3, 4000, 2)
    for layer, rate in zip(keep, (0.0, 0.25, 0.5)):
        assert set(np.unique(layer)) <= {np.float32(0), np.float32(1 / (1 - rate))}
        assert np.mean(layer == 0) == pytest.approx(rate, abs=0.02)
        assert layer.mean() == pytest.approx(1, abs=0.05)
    # Attention and MLP, and any two tiles, draw on their own.
    dropped = keep[2] == 0
    assert np.mean(dropped[:, 0] == dropped[:, 1]) == pytest.approx(0.5, abs=0.05)
    assert np.mean(dropped[1:] == dropped[:-1]) == pytest.approx(0.5, abs=0.05)


def rewards(batch, key):
    params = {"primary": random_params(CONFIG, 1)}
    run = functools.partial(branch_rewards, abstract_model(CONFIG)[0], dtype=jnp.dtype("float32"))
    keys = {} if key is None else drop_path_keys(key, batch, {"primary": "multimodal"})
    return np.asarray(jax.jit(run)(params, nnx.State({}), batch, keys=keys)["primary"])


def test_drop_path_belongs_to_the_group() -> None:
    key, views = jax.random.key(7), {"primary": "multimodal"}
    data = groups()
    twins = [dataclasses.replace(g, responses=(g.responses[0],) * 2) for g in data]
    got = rewards(one_micro(make_batch(twins, CONFIG, views=views)), key)
    np.testing.assert_array_equal(got[:, 0], got[:, 1])  # one image, one draw
    plain = rewards(one_micro(make_batch(twins, CONFIG, views=views)), None)
    assert np.all(np.abs(got - plain)[:, 0] > 1e-4)  # it does something
    again = rewards(one_micro(make_batch(twins, CONFIG, views=views)), jax.random.key(8))
    assert np.mean(np.abs(got - again)[:, 0] > 1e-4) >= 0.5
    # Another place in the batch, other neighbours, more padding: the same draws.
    moved = one_micro(make_batch([twins[2], twins[0]], CONFIG, views=views, num_groups=3, extra=2))
    np.testing.assert_allclose(rewards(moved, key)[:2, 0], got[[2, 0], 0], atol=1e-5)
    # Without a rate the key changes nothing.
    batch = one_micro(make_batch(twins, CONFIG, views=views))
    calm = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, drop_path_rate=0.0))
    run = functools.partial(branch_rewards, abstract_model(calm)[0], dtype=jnp.dtype("float32"))
    keys = drop_path_keys(key, batch, views)
    same = jax.jit(run)({"primary": random_params(CONFIG, 1)}, nnx.State({}), batch, keys=keys)["primary"]
    np.testing.assert_allclose(same, plain, atol=1e-6)


def test_branches_draw_on_their_own_and_a_shared_blank_tile_once() -> None:
    views: dict[str, BranchInput] = {"primary": "multimodal", "proxy": "blank"}
    batch = one_micro(make_batch(groups(proxy_tiles=1), CONFIG, views=views))
    keys = drop_path_keys(jax.random.key(0), batch, views)
    assert keys["primary"].shape == (4,) and keys["proxy"].shape == (1,)
    drawn = {b: np.asarray(jax.random.key_data(k)) for b, k in keys.items()}
    assert len(np.unique(np.concatenate([drawn["primary"], drawn["proxy"]]), axis=0)) == 5
    batch = one_micro(make_batch(groups(), CONFIG))
    views = {"primary": "multimodal", "proxy": "absent"}
    assert drop_path_keys(jax.random.key(0), batch, views).keys() == {"primary"}


def program_and_batch(monkeypatch: pytest.MonkeyPatch, objective: str = "standard", **options):
    """On one device; the warm-up is endless, so that parameters stay where they are."""
    config = TrainConfig(objective=objective, batch_size=4, **options)
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr("mmrm_jax.train.program.make_mesh", one)
    program = build_program(CONFIG, config, steps=10**9)
    views = program.views
    data = groups(proxy_tiles=1 if "blank" in views.values() else 0)
    batch = make_batch(data, CONFIG, micro_batches=config.micro_batches, views=views)
    return program, program.init(random_params(CONFIG, 1), config), program.put(batch)


def losses(program, state, batch, steps: int = 3, start: int = 0) -> list[float]:
    state, found = dataclasses.replace(state, step=jnp.asarray(start, jnp.int32)), []
    state = jax.tree.map(jnp.copy, state)  # a step gives up its state's buffers
    for _ in range(steps):
        state, metrics = program.train_step(state, batch)
        found.append(float(metrics["loss"]))
    return found


def test_training_draws_from_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is the same in one micro-batch or four, and after a restart; the next step and another seed differ."""
    base = program_and_batch(monkeypatch)
    want = losses(*base)
    assert len(set(want)) == 3
    np.testing.assert_allclose(losses(*base, start=2, steps=1), want[2:], rtol=1e-6)
    np.testing.assert_allclose(losses(*program_and_batch(monkeypatch, micro_batches=4)), want, rtol=1e-5)
    assert not np.allclose(losses(*program_and_batch(monkeypatch, seed=1), steps=1), want[:1], rtol=1e-4)
    # Evaluation draws nothing.
    program, state, batch = base
    micro = jax.tree.map(lambda x: x[0], batch)
    evaluated = program.eval_step(state.params, state.frozen, micro)["primary/margins"]
    plain = np.mean(np.logaddexp(0, -np.asarray(evaluated)[micro.comparisons.mask]))
    assert np.all(np.abs(np.array(want) - plain) > 1e-4)


def test_a_blank_tile_is_drawn_alike_however_the_batch_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        losses(*program_and_batch(monkeypatch, "shortcut_aware", proxy_input="blank", micro_batches=m), steps=1)
        for m in (1, 4)
    ]
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


def test_one_compiled_step_draws_by_the_seed_of_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    program, state, batch = program_and_batch(monkeypatch)
    other = program.init(random_params(CONFIG, 1), TrainConfig(objective="standard", batch_size=4, seed=1))
    want = losses(*program_and_batch(monkeypatch, seed=1), steps=2)
    np.testing.assert_allclose(losses(program, other, batch, steps=2), want, rtol=1e-6)
    assert not np.allclose(losses(program, state, batch, steps=2), want, rtol=1e-4)
