"""The schedule, joint clipping, weight decay and what is frozen, by hand and over real steps."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import MODEL, flat, make_batch, random_group, random_params

from mmrm_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from mmrm_jax.models.hf.names import name_table
from mmrm_jax.train.optimizer import decay_mask, learning_rate, make_optimizer
from mmrm_jax.train.program import build_program
from mmrm_jax.train.state import create_state, merge_branch, split_params
from mmrm_jax.types import Comparison

BRANCHES = {"primary": "multimodal", "proxy": "absent"}


def param(value: list[float]) -> nnx.Param:
    with nnx.use_eager_sharding(False):
        return nnx.Param(jnp.asarray(value), out_sharding=(None,))


def names(tree) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_schedule_by_hand() -> None:
    assert float(learning_rate(OptimizerConfig(learning_rate=2.0, warmup_fraction=0.1), 104)(11)) == 2.0  # not 10
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_fraction=0.1), 100)
    # 10 steps of warm-up, then 90 of half a cosine: at 55 it has run half its way, at 40 a third (cos 60 deg = 1/2)
    by_hand = {0: 0.0, 1: 0.2, 5: 1.0, 10: 2.0, 40: 2 * (1 + 0.5) / 2, 55: 1.0, 70: 2 * (1 - 0.5) / 2, 100: 0.0}
    for step, want in by_hand.items():
        assert float(rate(step)) == pytest.approx(want, abs=1e-6), step
    assert float(rate(1000)) == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_schedule_of_short_runs(steps: int) -> None:
    rates = [float(learning_rate(OptimizerConfig(), steps)(i)) for i in range(steps + 1)]
    assert rates[0] == 0.0
    assert all(0 <= r <= OptimizerConfig().learning_rate for r in rates)


def test_the_proxy_has_a_rate_and_a_start_of_its_own() -> None:
    """What a step moves, against the same gradients in the plain optimiser."""

    def path(**fields) -> list[dict[str, float]]:
        config = OptimizerConfig(learning_rate=0.1, warmup_fraction=0.0, **fields)
        optimizer = make_optimizer(config, 10)
        params = {b: nnx.State({"kernel": param([1.0])}) for b in (*BRANCHES, "heads")}
        state, found = optimizer.init(params), []
        for _ in range(4):
            grads = jax.tree.map(jnp.ones_like, params)
            updates, state = optimizer.update(grads, state, params)
            found.append({b: float(flat(u)["kernel"][0]) for b, u in updates.items()})
        return found

    plain, quick, first = path(), path(proxy_rate=3.0), path(head_start=2)
    for step in range(4):
        assert quick[step]["proxy"] == pytest.approx(3 * plain[step]["proxy"], rel=1e-6)
        assert first[step]["proxy"] == plain[step]["proxy"]
        for branch in ("primary", "heads"):
            assert quick[step][branch] == plain[step][branch]
            assert first[step][branch] == (0.0 if step < 2 else plain[step][branch])
    # Where there is no proxy nothing waits for one.
    waiting = TrainConfig(optimizer=OptimizerConfig(learning_rate=0.1, warmup_fraction=0.0, head_start=2))
    for objective, still in (("standard", False), ("text_only", False), ("shortcut_aware", True)):
        optimizer = build_program(MODEL, dataclasses.replace(waiting, objective=objective), 10).optimizer
        branch = "proxy" if objective == "text_only" else "primary"
        params = {branch: nnx.State({"kernel": param([1.0])})}
        state = optimizer.init(params)
        for _ in range(2):  # the first has no rate yet
            updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        assert (float(flat(updates[branch])["kernel"][0]) == 0) == still, objective
    with pytest.raises(ValueError, match="proxy_rate is 0; it must be above 0"):
        OptimizerConfig(proxy_rate=0)
    with pytest.raises(ValueError, match="head_start is -1; it must be at least 0"):
        OptimizerConfig(head_start=-1)


def test_both_branches_are_clipped_together() -> None:
    params = {b: nnx.State({"kernel": param([1.0, 1.0])}) for b in BRANCHES}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, b1=0.9), 10)
    # norms 3 and 4, together 5: both are divided by 5, to 0.6 and 0.8; the first moment is a tenth of that
    grads = {"primary": nnx.State({"kernel": param([3.0, 0.0])}), "proxy": nnx.State({"kernel": param([0.0, 4.0])})}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = state[1][0].mu
    np.testing.assert_allclose(flat(moments["primary"])["kernel"], [0.06, 0.0], rtol=1e-6)
    np.testing.assert_allclose(flat(moments["proxy"])["kernel"], [0.0, 0.08], rtol=1e-6)
    # Below the bound nothing changes
    small = jax.tree.map(lambda g: g * 0.1, grads)
    _, state = optimizer.update(small, optimizer.init(params), params)
    np.testing.assert_allclose(flat(state[1][0].mu["proxy"])["kernel"], [0.0, 0.04], rtol=1e-6)


def test_adamw_by_hand() -> None:
    config = OptimizerConfig(learning_rate=0.1, b1=0.9, b2=0.98, eps=0.0, weight_decay=0.5, clip_norm=10.0)
    optimizer = make_optimizer(config, 10)
    params = {"primary": nnx.State({"kernel": param([2.0]), "bias": param([2.0])})}
    grads = jax.tree.map(lambda p: 0 * p + 3.0, params)
    state = optimizer.init(params)
    # Step 1 has rate 0. With a constant gradient Adam's direction is its sign, so step 2, at the peak of the one-step
    # warm-up, moves by 0.1 * (1 + 0.5 * 2) = 0.2 with decay and by 0.1 without.
    for want in ({"kernel": 2.0, "bias": 2.0}, {"kernel": 1.8, "bias": 1.9}):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        got = {name: float(v[0]) for name, v in flat(params["primary"]).items()}
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_decay_spares_biases_and_norms_in_both_branches_alike(norm: str) -> None:
    vision = dataclasses.replace(MODEL.vision, norm=norm, qk_norm=True)
    config = dataclasses.replace(MODEL, vision=vision)
    trainable, _ = split_params(random_params(config, 0), {"primary": "multimodal", "proxy": "blank"}, ())
    masks = {b: flat(decay_mask(p)) for b, p in trainable.items()}
    assert masks["primary"] == masks["proxy"]
    # The same by the checkpoint's names: biases, norms and layer scale are what keeps its size.
    undecayed = ("bias", "norm", "ls1", "ls2", "mlp1.0")
    for entry in name_table(config):
        kept = any(part in entry.name for part in undecayed) and not entry.name.endswith("embedding")
        assert masks["primary"]["/".join(entry.path)] is not kept, entry.name


def test_absent_proxy_has_no_image_parts() -> None:
    params = random_params(MODEL, 0)
    trainable, frozen = split_params(params, BRANCHES, ("vision",))
    assert set(trainable["primary"]) == {"projector", "decoder", "score"}
    assert set(trainable["proxy"]) == {"decoder", "score"}
    assert set(frozen) == {"vision", "projector"}
    # A blank proxy looks at its tile, and trains the projector
    trainable, frozen = split_params(params, BRANCHES | {"proxy": "blank"}, ("vision",))
    assert set(trainable["proxy"]) == {"projector", "decoder", "score"}
    assert set(frozen) == {"vision"}
    # Both branches start from the same values, in buffers of their own, and what a branch trains wins over frozen
    for name, x in flat(trainable["primary"]).items():
        np.testing.assert_array_equal(x, flat(trainable["proxy"])[name])
        assert x is not flat(trainable["proxy"])[name]
    whole = flat(merge_branch(jax.tree.map(lambda x: x + 1, trainable["proxy"]), params))
    assert whole.keys() == flat(params).keys()
    np.testing.assert_array_equal(whole["score"], flat(params)["score"] + 1)


def test_unknown_frozen_part_raises() -> None:
    with pytest.raises(ValueError, match=r"visoin.*decoder.*vision"):
        split_params(random_params(MODEL, 0), BRANCHES, ("visoin",))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("vision", "projector", "decoder", "score"), "freeze leaves primary and proxy nothing to train"),
        (("decoder", "score"), "freeze leaves proxy nothing to train; the model's parts are decoder, projector, score"),
    ],
)
def test_a_branch_with_nothing_to_train_raises(freeze, message) -> None:
    with pytest.raises(ValueError, match=message):
        split_params(random_params(MODEL, 0), BRANCHES, freeze)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("learning_rate", -1e-5, "above 0 and finite"),
        ("learning_rate", 0.0, "above 0 and finite"),
        ("learning_rate", math.nan, "above 0 and finite"),
        ("b1", 1.0, "at least 0 and below 1"),
        ("b2", -0.1, "at least 0 and below 1"),
        ("eps", -1e-8, "at least 0 and finite"),
        ("weight_decay", -0.1, "at least 0 and finite"),
        ("clip_norm", 0.0, "above 0"),
        ("clip_norm", -1.0, "above 0"),
        ("warmup_fraction", 1.5, "from 0 to 1"),
    ],
)
def test_settings_that_no_optimizer_has(field, value, rule) -> None:
    with pytest.raises(ValueError, match=f"OptimizerConfig.{field} is {value}; it must be {rule}"):
        OptimizerConfig(**{field: value})


def test_frozen_parameters_have_no_moments() -> None:
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = create_state(random_params(MODEL, 0), BRANCHES, ("vision", "score"), optimizer, seed=0)
    moments = names(state.opt_state[1][0].mu)
    assert moments == names(state.params)
    assert not any("vision" in n or "score" in n for n in moments)
    assert not any("projector" in n for n in moments if "proxy" in n)


def test_steps_move_what_is_trained_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    config = TrainConfig(freeze=("vision", "score"), mesh=MeshConfig(1, 4, 2), batch_size=4)
    program = build_program(MODEL, config, steps=10)
    groups = [random_group(MODEL, rng, i, tiles=1, responses=2, comparisons=(Comparison(0, 1),)) for i in range(4)]
    batch = program.put(make_batch(groups, MODEL))
    start = random_params(MODEL, 2)
    before = flat(start)
    state, first = program.train_step(program.init(start, config), batch)
    for branch in BRANCHES:  # the first step has rate 0
        for name, x in flat(state.params[branch]).items():
            np.testing.assert_array_equal(x, before[name], err_msg=name)
    state, second = program.train_step(state, batch)
    for branch in BRANCHES:
        for name, x in flat(state.params[branch]).items():
            assert np.any(np.asarray(x) != before[name]), (branch, name)
    for name, x in flat(state.frozen).items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)
    assert math.isclose(first["loss"], second["loss"], rel_tol=1e-6)
    # The caller's parameters survive the donated state, and start another run.
    again, repeated = program.train_step(program.init(start, config), batch)
    assert int(again.step) == 1
    assert float(repeated["loss"]) == float(first["loss"])
