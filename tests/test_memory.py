"""What remat saves and changes, and what a frozen vision tower does not cost, by the compiler's own account."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import (
    DECODER,
    VISION,
    compile_train_step,
    flat,
    make_batch,
    one_micro,
    random_group,
    random_params,
    relative_errors,
)

from mmrm_jax.config import MeshConfig, ModelConfig, Remat, TrainConfig, VisionConfig
from mmrm_jax.models import layers
from mmrm_jax.plan.estimate import estimate_memory, saved_activations
from mmrm_jax.plan.hardware import CHIPS, Topology
from mmrm_jax.plan.search import Job, placed_batch
from mmrm_jax.plan.shapes import DataShape
from mmrm_jax.train.program import build_program
from mmrm_jax.train.state import abstract_model
from mmrm_jax.types import Comparison

DEEP = ModelConfig(vision=dataclasses.replace(VISION, num_layers=6), decoder=dataclasses.replace(DECODER, num_layers=6))


def batch(model: ModelConfig, groups: int, tiles: int = 1):
    rng = np.random.default_rng(0)
    return make_batch(
        [random_group(model, rng, i, tiles=tiles, responses=2, comparisons=(Comparison(0, 1),)) for i in range(groups)],
        model,
    )


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Compile as for a user."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def by_policy():
    """{policy: (gradients of a sum of rewards with respect to everything, bytes of temporaries)}.

    "cpu" is what "none" does on one CPU, and "none" what it does elsewhere.
    """
    one = jax.tree.map(jnp.asarray, one_micro(batch(DEEP, 16)))
    params, found = random_params(DEEP, 1), {}

    def measure(remat: Remat):
        vision, decoder = (dataclasses.replace(part, remat=remat) for part in (DEEP.vision, DEEP.decoder))
        graphdef = abstract_model(ModelConfig(vision, decoder))[0]

        def score(p):
            rewards = nnx.merge(graphdef, p).rewards(one.prefixes["primary"], one.responses)
            return jnp.sum(jnp.sin(rewards))

        with optimised():
            compiled = jax.jit(jax.grad(score)).lower(params).compile()
        return flat(compiled(params)), compiled.memory_analysis().temp_size_in_bytes

    found["cpu"] = measure("none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "on_one_cpu", lambda: False)
        for policy in ("none", "dots", "full"):
            found[policy] = measure(policy)
    return found


def test_gradients_are_the_same_with_every_policy(by_policy) -> None:
    want = dict(by_policy["none"][0])
    # Without rotary positions a bias of the keys adds the same to all of a query's scores: its gradient is rounding.
    rounding = want.pop("vision/layers/k/bias")
    assert np.abs(rounding).max() < 1e-6 * np.abs(want["vision/layers/k/kernel"]).max()
    assert all(np.any(g) for g in want.values())
    for policy in ("cpu", "dots", "full"):
        errors = relative_errors({name: by_policy[policy][0][name] for name in want}, want)
        assert max(errors.values()) < 1e-6, (policy, sorted(errors.items(), key=lambda e: -e[1])[:5])


def test_each_policy_saves_less_than_the_one_before(by_policy) -> None:
    none, dots, full = (by_policy[policy][1] for policy in ("none", "dots", "full"))
    # Six layers of each kind: 6.6, 2.2 and 0.9 MB when this was written.
    assert dots < none / 2 and full < dots / 2
    assert by_policy["cpu"][1] < dots


def test_a_frozen_tower_has_no_backward_pass_and_takes_no_memory_for_one() -> None:
    tower = dataclasses.replace(VISION, image_size=16, width=64, mlp_width=256, num_layers=2)
    model, devices, groups, tiles = ModelConfig(tower, DECODER), 8, 16, 2
    made, steps = batch(model, groups, tiles), {}
    for name, freeze in (("frozen", ("vision",)), ("trained", ())):
        config = TrainConfig(objective="standard", freeze=freeze, mesh=MeshConfig(devices, 1, 1))
        steps[name] = compile_train_step(model, config, made)
    frozen, trained = (steps[name].memory_analysis() for name in ("frozen", "trained"))
    params = 4 * sum(x.size for x in jax.tree.leaves(abstract_model(model)[1]["vision"]))
    assert trained.argument_size_in_bytes - frozen.argument_size_in_bytes == 2 * params  # Adam's two moments
    # Beside gradients the backward pass needs at least what goes into each matrix product with weights.
    tokens = groups * tiles // devices * (1 + (tower.image_size // tower.patch_size) ** 2)
    inputs = 4 * tokens * tower.num_layers * (3 * tower.width + tower.mlp_width)
    assert trained.temp_size_in_bytes - frozen.temp_size_in_bytes > params + inputs
    # A backward pass is twice the forward pass: products with weights, scores, weighted values.
    weights = 2 * tokens * (4 * tower.width**2 + 2 * tower.width * tower.mlp_width)
    attention = 2 * 2 * tokens * (tokens * devices // groups // tiles) * tower.width
    backward = 2 * tower.num_layers * (weights + attention)
    added = steps["trained"].cost_analysis()["flops"] - steps["frozen"].cost_analysis()["flops"]
    assert added == pytest.approx(backward, rel=0.1)  # the rest is norms, softmax and GELU


def test_what_a_frozen_tower_saves_is_what_the_analysis_of_mmrm_plan_predicts() -> None:
    """The step's peak on one device: its arguments and all that it allocates."""
    tower = VisionConfig(image_size=28, patch_size=2, width=128, mlp_width=512, num_layers=6, num_heads=4)
    decoder = dataclasses.replace(DECODER, width=64, mlp_width=128, head_width=32, num_kv_heads=2)
    model, shape = ModelConfig(tower, decoder), DataShape(tiles=2, prompt=16, response=16)
    found, predicted = {}, {}
    for freeze in ((), ("vision",)):
        config = TrainConfig(objective="standard", batch_size=16, freeze=freeze, remat="dots", mesh=MeshConfig(2, 2, 2))
        program = build_program(model, config, 10)
        abstract = placed_batch(Job(model, config, shape, Topology("", CHIPS["h100"], 8, None)), program)
        memory = program.lower_train_step(program.abstract, abstract).compile().memory_analysis()
        found[freeze] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        saved = saved_activations(program, model, config, shape)
        predicted[freeze] = estimate_memory(program, abstract, model, config, shape, saved).total
    saving = predicted[()] - predicted["vision",]
    assert found[()] - found["vision",] == pytest.approx(saving, rel=0.1)
    assert saving > found[()] / 2  # with its backward pass the tower is most of what there is
