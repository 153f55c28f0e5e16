"""The correlation information bottleneck: numbers worked out by hand, gradients, a real step."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import comparisons
from test_rivals import a_step

from mmrm_jax.objectives import Seen, find_objective
from mmrm_jax.train.state import HEADS

LN2 = math.log(2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def of_winners(*values: float) -> jax.Array:
    """Pooled states [C, 2, 1] of pairs whose loser's do not count."""
    return jnp.asarray([[[v], [77.0]] for v in values], jnp.float32)


def given(text, image, *, variance: float = 0.0, mask=(True, True)) -> Seen:
    """Rewards all alike, whatever is drawn: what is above ln 2 is the bottleneck's."""
    n = len(text)
    heads = {"score": jnp.zeros((1, 1)), "variance": jnp.full((1, 1), variance), "critic": jnp.ones((1, 1))}
    states = {"primary": jnp.zeros((n, 2, 1)), "text": of_winners(*text), "image": of_winners(*image)}
    keys = jax.random.split(jax.random.key(0), n)
    return Seen({"primary": jnp.zeros((n, 2))}, comparisons(n, mask=list(mask)), pooled=states, heads=heads, keys=keys)


@pytest.mark.usefixtures("strict_numerics")
def test_by_hand() -> None:
    # Unit variances: divergences from N(0, 1) are half the squares; of T and V from each other half that of t - v.
    known = [0.5 + 2.0 + 0.5, 0.5 + 0.125 + 1.125]
    shared = [-softplus(-2) - softplus(0.5), -softplus(0.5) - softplus(-2)]  # f = t_i v_j: 2, 0.5; -2, -0.5
    found = find_objective("cib:beta=3").terms(given([1, -1], [2, 0.5])).loss
    np.testing.assert_allclose(found, LN2 + 3 * (np.array(known) - shared), rtol=1e-6)
    # A comparison that is not there is no negative, and without negatives there is nothing to tell apart from.
    alone = find_objective("cib:beta=3").terms(given([1, 9], [2, 9], mask=(True, False))).loss[0]
    assert float(alone) == pytest.approx(LN2 + 3 * (3.0 + softplus(-2)), rel=1e-6)


@pytest.mark.usefixtures("strict_numerics")
def test_variances_count() -> None:
    """log sigma^2 = h here; KL(N(m, v) || N(n, w)) = (log w / v + (v + (m - n)^2) / w - 1) / 2."""

    def divergence(m: float, v: float, n: float, w: float) -> float:
        return (math.log(w / v) + (v + (m - n) ** 2) / w - 1) / 2

    t, v = 1.0, -0.5
    known = divergence(t, math.exp(t), 0, 1) + divergence(v, math.exp(v), 0, 1)
    known += (divergence(t, math.exp(t), v, math.exp(v)) + divergence(v, math.exp(v), t, math.exp(t))) / 2
    seen = given([t, 0], [v, 0], variance=1.0)
    found = find_objective("cib:beta=1").terms(seen).loss[0]
    assert float(found) == pytest.approx(LN2 + known + softplus(0.5) + softplus(0), rel=1e-6)


def test_the_bottleneck_alone_reaches_the_states_of_either_input() -> None:
    seen = given([1, -1], [2, 0.5])

    def total(pooled, beta):
        return jnp.sum(find_objective(f"cib:beta={beta}").terms(dataclasses.replace(seen, pooled=pooled)).loss)

    for beta, reached in ((0, False), (1, True)):
        grads = jax.grad(total)(seen.pooled, beta)
        for name in ("text", "image"):
            assert bool(np.all(grads[name][:, 0])) is reached and not np.any(grads[name][:, 1])  # winners alone


def test_a_step_trains_both_heads_and_the_projector() -> None:
    program, before, state, metrics = a_step("cib:beta=0.1")
    assert np.isfinite(metrics["loss"]) and float(metrics["comparisons"]) == 4
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert moved[HEADS].keys() == {"variance", "critic"} and all(jax.tree.leaves(moved[HEADS]))
    assert any(jax.tree.leaves(moved["primary"]["projector"])) and any(jax.tree.leaves(moved["primary"]["decoder"]))
    assert program.inputs == {"primary": "multimodal", "text": "absent", "image": "image_only"}
