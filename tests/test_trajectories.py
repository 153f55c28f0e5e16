"""Optimiser steps of the authors' trainer, from their initial parameters: losses, norms and parameters on the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_batches import golden_batch, golden_groups, golden_models
from goldens import fixtures, sibling
from safetensors.numpy import load_file
from tiny_models import flat

from mmrm_jax.config import OptimizerConfig
from mmrm_jax.models.hf.names import PROXY_PREFIX, name_table
from mmrm_jax.models.hf.weights import save_params
from mmrm_jax.objectives import shortcut_aware, standard
from mmrm_jax.train.optimizer import learning_rate, make_optimizer, reference_decay_mask
from mmrm_jax.train.state import TrainState, abstract_model
from mmrm_jax.train.step import make_train_step

TOLERANCE = 1e-4


RUNS = fixtures("train", "train.json", "steps.npz")


def optimizer_config(log: dict) -> OptimizerConfig:
    config = OptimizerConfig(
        learning_rate=log["lr"],
        b1=log["betas"][0],
        b2=log["betas"][1],
        eps=log["eps"],
        weight_decay=log["weight_decay"],
        clip_norm=log["max_grad_norm"],
        warmup_fraction=log["warmup_steps"] / log["steps"],
        decay_groups="reference",
    )
    assert log["scheduler"] == "cosine"
    return config


def without_vision(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The fixtures' branches have different frozen towers, so here each holds its own, and it is kept still.

    The second entry of the optimiser's state is the norm of the gradient of everything else.
    """

    def vision(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[1].key == "vision", params)

    still = optax.masked(optax.set_to_zero(), vision)
    norm = optax.GradientTransformation(lambda p: jnp.zeros(()), lambda u, s, p=None: (u, optax.tree.norm(u)))
    return optax.chain(still, norm, optimizer, still)


@pytest.mark.parametrize("folder", RUNS)
def test_training_follows_the_authors(folder: Path, tmp_path: Path) -> None:
    log, steps = json.loads((folder / "train.json").read_text()), np.load(folder / "steps.npz")
    source = sibling(folder, log["source_fixture"])
    config, params = golden_models(source, tmp_path)
    branches = ("primary", "proxy") if log["robust"] else ("primary",)
    params = {branch: params[branch] for branch in branches}
    parts = log["gradient_accumulation"]
    # With accumulation their data set is the batch several times over; every step sees all of it.
    groups = [dataclasses.replace(g, index=i) for i, g in enumerate(golden_groups(source, config) * parts)]
    batch = golden_batch(groups, config, micro_batches=parts)
    optimizer = without_vision(make_optimizer(optimizer_config(log), log["steps"], config.decoder.family))
    objective = shortcut_aware() if log["robust"] else standard()
    graphdef, zero = abstract_model(config)[0], jnp.zeros((), jnp.int32)
    step = jax.jit(make_train_step(graphdef, objective, optimizer, jnp.dtype("float32"), "blank"))
    state = TrainState(params, nnx.State({}), optimizer.init(params), step=zero, seed=zero)
    losses = np.array(log["micro_batch_losses"]).reshape(-1, parts).mean(axis=1)
    for i, entry in enumerate(log["log"]):
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(losses[i], rel=TOLERANCE), i
        assert float(state.opt_state[1]) == pytest.approx(entry["grad_norm"], rel=TOLERANCE), i
        now = saved(state, config, tmp_path)
        for name in (k for k in steps.files if k.startswith(f"step{i + 1}.")):
            close(now[name.partition(".")[2]], steps[name], f"{name} after step {i + 1}")
    for name in (k for k in steps.files if k.startswith("final.")):
        close(now[name.removeprefix("final.")], steps[name], name)
    before = {k: v for k, v in load_file(source / "model.safetensors").items()}
    before |= {PROXY_PREFIX + k: v for k, v in load_file(source / "proxy.safetensors").items()}
    for name, final in log["final"].items():
        if name in now:  # all but the LM head
            assert np.linalg.norm(now[name].astype(np.float64)) == pytest.approx(final["norm"], rel=TOLERANCE), name
            moved = np.linalg.norm(now[name].astype(np.float64) - before[name])
            assert moved == pytest.approx(final["delta"], rel=1e-3, abs=1e-6), name


def close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=what)


def saved(state: TrainState, config, folder: Path) -> dict[str, np.ndarray]:
    """Parameters by the authors' names."""
    save_params(folder, config, state.params["primary"], proxy=state.params.get("proxy"))
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("folder", RUNS)
def test_schedule_and_decay_groups_are_the_authors(folder: Path, tmp_path: Path) -> None:
    log = json.loads((folder / "train.json").read_text())
    rate = learning_rate(optimizer_config(log), log["steps"])
    for entry in log["log"]:  # logged after a step: the rate of the next
        assert float(rate(entry["step"])) == pytest.approx(entry["learning_rate"], rel=1e-5, abs=1e-12)
    config, params = golden_models(sibling(folder, log["source_fixture"]), tmp_path)
    branches = {"primary": ""} | ({"proxy": PROXY_PREFIX} if log["robust"] else {})
    masks = reference_decay_mask({b: params[b] for b in branches}, config.decoder.family)
    seen = set()
    for branch, prefix in branches.items():
        mask = flat(masks[branch])
        for entry in name_table(config):
            for layer in range(max(config.vision.num_layers, config.decoder.num_layers)):
                name = prefix + entry.name.format(layer)
                theirs = log["param_groups"].get(name, "frozen")
                if theirs != "frozen":
                    assert mask["/".join(entry.path)] is (theirs == "decay"), name
                    seen.add(name)
    trained = {k for k, v in log["param_groups"].items() if v != "frozen"}
    assert seen == trained
