"""Adapters: nothing at first, then what a low-rank change of the weights would be, and nothing else that trains."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import FAST, run, write_pairs
from flax import nnx
from rich.console import Console
from tiny_models import MODEL, flat, make_batch, one_micro, random_group, random_params, relative_errors

from mmrm_jax.config import LoraConfig, MeshConfig, OptimizerConfig, TrainConfig
from mmrm_jax.eval.saved_run import read_run
from mmrm_jax.models.hf.weights import load_params
from mmrm_jax.models.lora import fold_adapters, merge_model
from mmrm_jax.objectives import shortcut_aware
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.program import build_program
from mmrm_jax.train.setup import open_checkpoint
from mmrm_jax.train.state import abstract_model, merge_branch, split_params
from mmrm_jax.train.step import branch_rewards
from mmrm_jax.types import Comparison

LORA = LoraConfig(rank=3, alpha=6.0, targets=("decoder", "projector.fc1", "vision.q"))
VIEWS = shortcut_aware().views("absent")
CONFIG = TrainConfig(lora=LORA, mesh=MeshConfig(1, 4, 2), optimizer=OptimizerConfig(learning_rate=1e-2))
SCALE = 2.0  # alpha / rank


def batch():
    rng = np.random.default_rng(0)
    groups = [random_group(MODEL, rng, i, tiles=1, responses=2, comparisons=(Comparison(0, 1),)) for i in range(4)]
    return make_batch(groups, MODEL)


def randomise(adapters: nnx.State, seed: int) -> nnx.State:
    """With B away from 0, where adapters change something and A has a gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), adapters)


def names(params: nnx.State) -> set[str]:
    return set(flat(params))


@pytest.fixture(scope="module")
def branches() -> tuple[dict[str, nnx.State], nnx.State]:
    return split_params(random_params(MODEL, 1), VIEWS, ("vision",), LORA, seed=5)


@functools.cache
def rewards():
    """`rewards(params)` of the primary branch, compiled."""
    graphdef, one = abstract_model(MODEL)[0], jax.tree.map(jnp.asarray, one_micro(batch()))

    def score(params: nnx.State) -> jax.Array:
        return merge_model(graphdef, params).rewards(one.prefixes["primary"], one.responses)

    return jax.jit(score), jax.jit(jax.grad(lambda p, frozen: jnp.sum(jnp.sin(score(merge_branch(p, frozen))))))


def test_what_has_adapters(branches) -> None:
    trainable, frozen = branches
    decoder = {f"decoder/layers/{x}/kernel_lora_{m}" for x in ("q", "k", "v", "o", "gate", "up", "down") for m in "ab"}
    image = {f"{x}/kernel_lora_{m}" for x in ("projector/fc1", "vision/layers/q") for m in "ab"}
    assert names(trainable["primary"]) == decoder | image | {"score"}
    assert names(trainable["proxy"]) == decoder | {"score"}  # it sees no image
    # One copy of the trunk, and of nothing else.
    assert names(frozen) == names(random_params(MODEL, 1)) - {"score"}
    shapes = {name: x.shape for name, x in flat(trainable["primary"]).items()}
    assert shapes["decoder/layers/gate/kernel_lora_a"] == (2, 16, 3)
    assert shapes["decoder/layers/gate/kernel_lora_b"] == (2, 3, 24)
    assert shapes["projector/fc1/kernel_lora_a"] == (32, 3)


def test_adapters_start_as_he_draws_and_zeros(branches) -> None:
    trainable, _ = branches
    for name, x in flat(trainable["primary"]).items():
        if name.endswith("kernel_lora_b"):
            assert not np.any(x), name
    wide = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, width=256, num_layers=4))
    lora = LoraConfig(rank=64, targets=("decoder.q",))
    drawn, _ = split_params(random_params(wide, 0), VIEWS, (), lora)
    a = np.asarray(flat(drawn["primary"])["decoder/layers/q/kernel_lora_a"])
    assert a.std() == pytest.approx(256**-0.5, rel=0.02) and abs(a.mean()) < 1e-3
    # Every layer and branch draws for itself, and the seed decides.
    assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.05
    proxy = np.asarray(flat(drawn["proxy"])["decoder/layers/q/kernel_lora_a"])
    assert abs(np.corrcoef(a.ravel(), proxy.ravel())[0, 1]) < 0.05
    other, _ = split_params(random_params(wide, 0), VIEWS, (), lora, seed=1)
    assert np.any(a != np.asarray(flat(other["primary"])["decoder/layers/q/kernel_lora_a"]))


def test_step_0_is_the_base_model_exactly(branches) -> None:
    """To the bit, when operations are not fused: two compiled programs may round the same product differently."""
    trainable, frozen = branches
    graphdef, one = abstract_model(MODEL)[0], jax.tree.map(jnp.asarray, one_micro(batch()))

    def score(params: nnx.State) -> np.ndarray:
        return np.asarray(merge_model(graphdef, params).rewards(one.prefixes["primary"], one.responses))

    with jax.disable_jit():
        want = score(random_params(MODEL, 1))
        np.testing.assert_array_equal(score(merge_branch(trainable["primary"], frozen)), want)
        changed = merge_branch(randomise(trainable["primary"], 0), frozen)
        assert np.abs(score(changed) - want).min() > 1e-3


def test_folded_adapters_are_the_same_model(branches) -> None:
    trainable, frozen = branches
    adapted = merge_branch(randomise(trainable["primary"], 0), frozen)
    folded = fold_adapters(adapted)
    assert names(folded) == names(random_params(MODEL, 1))
    a, b, w = (flat(adapted)[f"decoder/layers/down/{x}"] for x in ("kernel_lora_a", "kernel_lora_b", "kernel"))
    for layer in range(2):
        by_hand = np.asarray(w[layer], np.float64) + SCALE * np.asarray(a[layer], np.float64) @ np.asarray(b[layer])
        np.testing.assert_allclose(flat(folded)["decoder/layers/down/kernel"][layer], by_hand, rtol=1e-5, atol=1e-6)
    score, _ = rewards()
    np.testing.assert_allclose(score(folded), score(adapted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 8])
def test_gradients_are_those_of_the_folded_weights(rank: int) -> None:
    """dA = scale dW B^T and dB = scale A^T dW, where dW is the gradient of W + scale A B.

    Of rank 8, A or B has the shape of some kernels: those of the tower's q and the decoder's k and v.
    """
    lora, scale = dataclasses.replace(LORA, rank=rank), LORA.alpha / rank
    trainable, frozen = split_params(random_params(MODEL, 1), VIEWS, ("vision",), lora, seed=5)
    adapters = randomise(trainable["primary"], 0)
    _, gradient = rewards()
    got = flat(gradient(adapters, frozen))
    whole = fold_adapters(merge_branch(adapters, frozen))
    dense, values = flat(gradient(whole, nnx.State({}))), flat(adapters)
    want = {"score": dense["score"]}
    for path in (name.removesuffix("/kernel_lora_a") for name in values if name.endswith("/kernel_lora_a")):
        a, b, dw = (
            np.asarray(x, np.float64)
            for x in (values[f"{path}/kernel_lora_a"], values[f"{path}/kernel_lora_b"], dense[f"{path}/kernel"])
        )
        want[f"{path}/kernel_lora_a"] = scale * dw @ np.swapaxes(b, -1, -2)
        want[f"{path}/kernel_lora_b"] = scale * np.swapaxes(a, -1, -2) @ dw
    errors = relative_errors(got, want)
    assert max(errors.values()) < 1e-5, errors


def test_adapters_are_computed_in_the_dtype_of_the_rest(branches) -> None:
    trainable, frozen = branches
    adapted = merge_branch(randomise(trainable["primary"], 0), frozen)
    graphdef, one = abstract_model(MODEL)[0], jax.tree.map(jnp.asarray, one_micro(batch()))

    def score(params: nnx.State) -> jax.Array:
        dtype = jnp.dtype("bfloat16")
        return branch_rewards(graphdef, {"primary": params}, nnx.State({}), one, dtype)["primary"]

    def products(params: nnx.State) -> collections.Counter:
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(score(p))))(params))
        return collections.Counter(re.findall(r":(\w+)\[[\d,]*\] = dot_general", jaxpr))

    ours, whole = products(adapted), products(fold_adapters(adapted))
    assert ours["bf16"] > whole["bf16"] > 0 and ours["f32"] == whole["f32"]
    exact, rounded = (np.ravel(f(adapted)) for f in (rewards()[0], jax.jit(score)))
    assert np.corrcoef(exact, rounded)[0, 1] > 0.99


def bytes_of(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_primary_and_proxy_share_one_frozen_trunk() -> None:
    program = build_program(MODEL, CONFIG, steps=10)
    start = random_params(MODEL, 1)
    state = program.init(start, CONFIG)
    assert bytes_of(state.frozen) == bytes_of(start) - bytes_of(start["score"])
    adam = state.opt_state[1][0]
    for branch, params in state.params.items():
        assert names(adam.mu[branch]) == names(adam.nu[branch]) == names(params)
        for name, x in flat(params).items():
            assert flat(adam.mu[branch])[name].sharding == x.sharding, name
    frozen = jax.tree.map(np.asarray, flat(state.frozen))
    before = {b: jax.tree.map(np.asarray, flat(p)) for b, p in state.params.items()}
    placed = program.put(batch())
    losses = []
    for _ in range(3):
        state, metrics = program.train_step(state, placed)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] > losses[2]  # the first step's rate is 0
    for name, x in flat(state.frozen).items():
        np.testing.assert_array_equal(x, frozen[name], err_msg=name)
    for branch, params in state.params.items():
        assert all(np.any(np.asarray(x) != before[branch][name]) for name, x in flat(params).items()), branch


def test_what_is_frozen_can_be_kept_in_half_the_bytes(branches) -> None:
    params = random_params(MODEL, 1)
    trainable, frozen = split_params(params, VIEWS, ("vision", "score"), LORA, 5, "bfloat16")
    assert bytes_of(frozen["decoder"]) * 2 == bytes_of(params["decoder"])
    assert {x.dtype.name for x in jax.tree.leaves((trainable, frozen["score"]))} == {"float32"}
    score, _ = rewards()
    want = np.asarray(score(params))
    got = np.asarray(score(merge_branch(trainable["primary"], frozen)))
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
    # What is computed in float32 goes on being: only the weights were rounded.
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    rounded["score"] = params["score"]
    np.testing.assert_allclose(got, score(rounded), rtol=1e-5, atol=1e-5)


def test_one_branch_alone_can_have_adapters() -> None:
    lora = dataclasses.replace(LORA, targets=("decoder",), branches=("proxy",))
    trainable, frozen = split_params(random_params(MODEL, 1), VIEWS, ("vision",), lora)
    assert names(trainable["primary"]) == {n for n in names(random_params(MODEL, 1)) if not n.startswith("vision")}
    assert {n.split("/")[-1] for n in names(trainable["proxy"])} == {"kernel_lora_a", "kernel_lora_b", "score"}
    # The proxy goes on from the frozen decoder, the primary from its own.
    moved = jax.tree.map(lambda x: x + 1, trainable["primary"])
    own = flat(random_params(MODEL, 1))["decoder/embedding"]
    np.testing.assert_array_equal(flat(merge_branch(moved, frozen))["decoder/embedding"], own + 1)
    np.testing.assert_array_equal(flat(merge_branch(trainable["proxy"], frozen))["decoder/embedding"], own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ("decoder.qq",)},
            r"lora.targets names decoder.qq; the model has decoder, decoder.down, .*vision.v",
        ),
        ({"branches": ("proxi",)}, "lora.branches names proxi; the objective has primary, proxy"),
        ({"rank": 16}, "lora.rank is 16; projector.fc1, of 32 inputs and 16 outputs, needs another"),
        ({"rank": -1}, "LoraConfig.rank is -1; it must be at least 1, or 0 to train without adapters"),
        ({"alpha": 0.0}, "LoraConfig.alpha is 0.0; it must be above 0"),
        ({"targets": ()}, "LoraConfig.targets is empty"),
        ({"branches": ()}, "LoraConfig.branches is empty"),
    ],
)
def test_settings_that_make_no_sense(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_program(MODEL, dataclasses.replace(CONFIG, lora=dataclasses.replace(LORA, **changes)), 1)


@pytest.mark.usefixtures("its_own_device")
def test_a_run_with_adapters_resumes_and_is_exported_as_any_model(capsys, tmp_path) -> None:
    file = write_pairs(tmp_path, "pairs", 12)
    settings = [a.replace("--train.", "--") for a in FAST] + ["--data.holdout", 0, "--lora.rank", 2]
    settings += ["--optimizer.learning-rate", 0.05, "--steps", 4, "--checkpoint-every", 2]
    train = ("train", "--data", file, "--out", tmp_path / "run", *settings)
    status, text = run(capsys, *train)
    assert status == 0, text
    saved = read_run(tmp_path / "run")
    state, step = saved.restore(Console())
    assert step == 4 and names(state.params["proxy"]) >= {"score", "decoder/layers/q/kernel_lora_b"}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    status, text = run(capsys, *train)
    assert status == 0 and "going on from step 2" in text
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(saved.restore(Console())[0])):
        np.testing.assert_array_equal(a, b)
    status, text = run(capsys, "export", "--run", tmp_path / "run", "--out", tmp_path / "out", "--proxy")
    assert status == 0, text
    config = open_checkpoint(tmp_path / "out").config
    base, _ = load_params(MODEL_DIR, config, random_params(config, 0))
    for branch in ("primary", "proxy"):
        loaded, drawn = load_params(tmp_path / "out", config, abstract_model(config)[1], branch=branch)
        assert drawn == []
        want = flat(fold_adapters(merge_branch(state.params[branch], state.frozen)))
        assert names(loaded) == set(want)
        for name, x in flat(loaded).items():
            np.testing.assert_array_equal(x, want[name], err_msg=name)
            adapted = re.fullmatch(r"decoder/layers/.*/kernel|score", name)
            assert np.array_equal(x, flat(base)[name]) != bool(adapted), name
