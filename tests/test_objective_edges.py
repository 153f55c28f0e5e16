"""Objectives where numbers round to 0 or 1, where batches hold the same comparison twice, and where they hold none."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import LN2, comparisons, seen

from mmrm_jax.objectives import Seen, find_objective

pytestmark = pytest.mark.usefixtures("strict_numerics")


def losses_and_gradients(spec: str, d: list[float], *, changed: bool = True, **kinds) -> tuple[np.ndarray, np.ndarray]:
    """Of every margin; where there is another image its margin is half of it."""
    objective = find_objective(spec)

    def total(d):
        what = seen({"primary": d, "proxy": d, "permuted": d / 2}, comparisons(len(d), **kinds))
        loss = objective.terms(dataclasses.replace(what, changed={"permuted": jnp.full(len(d), changed)})).loss
        return jnp.sum(loss), loss

    gradients, losses = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(d))
    return np.asarray(losses), np.asarray(gradients)


@pytest.mark.parametrize("changed", [True, False])
def test_mcr_has_gradients_at_margins_that_saturate(changed: bool) -> None:
    d = [0.0, 16.0, 17.0, 40.0, -40.0, 110.0, -110.0, 300.0]
    assert all(np.all(np.isfinite(x)) for x in losses_and_gradients("mcr", d, changed=changed))


def test_mcr_is_the_divergence_of_two_coins() -> None:
    """Between 1/2 and 3/4: H(5/8) - (H(1/2) + H(3/4)) / 2, which the loss has less of."""

    def entropy(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    def loss(other: float) -> float:
        margins = {"primary": jnp.zeros(1), "permuted": jnp.full(1, other)}
        what = dataclasses.replace(seen(margins, comparisons(1)), changed={"permuted": jnp.ones(1, bool)})
        return float(find_objective("mcr").terms(what).loss[0])

    apart = entropy(5 / 8) - (entropy(1 / 2) + entropy(3 / 4)) / 2
    assert loss(0.0) - loss(math.log(3)) == pytest.approx(0.1 * apart, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 2.0])
def test_focal_weights_have_gradients_at_0(gamma: float) -> None:
    """Where p rounds to 1, and at a label that is a tie and met exactly."""
    d, tie = [18.0, 60.0, 200.0, -200.0, 0.0, 1e-6], [False] * 4 + [True] * 2
    found = losses_and_gradients(f"focal:gamma={gamma}", d, tie=tie)
    assert all(np.all(np.isfinite(x)) for x in found)
    # Surely right: the loss is softplus(-d) = e^-d, and so is 1 - p.
    np.testing.assert_allclose(found[0][0], math.exp(-18 * (gamma + 1)), rtol=1e-5)


@pytest.mark.parametrize("numbers", [[0, 0, 1], [7, 7, 9], [2**20, 2**20, 3]])
def test_environments_may_have_any_number(numbers: list[int]) -> None:
    """mean of (ln 2 + ln 2) / 2 and ln 4, and three times their variance, (ln 2 / 2)^2."""
    c = dataclasses.replace(comparisons(3), given={"environment": jnp.asarray(numbers, jnp.float32)})
    what = seen({"primary": jnp.asarray([0.0, 0.0, -math.log(3)])}, c)
    loss = what.mean(find_objective("v_rex:beta=3").terms(what).loss)
    assert float(loss) == pytest.approx(1.5 * LN2 + 3 * (LN2 / 2) ** 2, rel=1e-6)


def test_a_comparison_listed_twice_counts_its_factor_once() -> None:
    rewards = {"primary": jnp.log(jnp.array([[3.0, 2.0, 1.0]]))}

    def total(index: list[list[int]]) -> float:
        c = comparisons(len(index), index=index)
        return float(jnp.sum(find_objective("listwise").terms(Seen(rewards, c)).loss))

    once = total([[0, 1], [0, 2], [1, 2]])
    assert once == pytest.approx(math.log(2) + math.log(3 / 2), rel=1e-6)
    assert total([[0, 1], [0, 2], [1, 2], [0, 1], [1, 2]]) == pytest.approx(once, rel=1e-6)


def test_a_negative_target_margin_is_one() -> None:
    c = comparisons(1, index=[[0, 1]], margin=[-1.0])
    found = find_objective("listwise").terms(Seen({"primary": jnp.zeros((1, 2))}, c)).loss
    assert float(found[0]) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)  # Bradley-Terry's softplus(m)


@pytest.mark.parametrize("spec", ["shortcut_aware", "dual_sfc"])
def test_a_target_margin_counts_in_the_weights_of_evaluation(spec: str) -> None:
    objective, c = find_objective(f"{spec}+margin:m=2"), comparisons(3)
    margins = {branch: jnp.asarray([0.3, -1.0, 2.0]) * (i + 1) for i, branch in enumerate(objective.branches)}
    trained = objective.terms(seen(margins, c)).sfc
    assert objective.weigh is not None and trained is not None
    np.testing.assert_allclose(objective.weigh(margins, c), trained, rtol=1e-6)
    assert find_objective("standard+margin").weigh is None


@pytest.mark.parametrize(("spec", "other"), [("image_contrast", "other1"), ("mcr", "permuted")])
def test_two_forward_passes_of_a_branch_lose_the_same_slope_on_length(spec: str, other: str) -> None:
    """Where they give the same rewards, what compares them sees no difference, whatever the lengths."""

    def loss(spec: str, lengths: list[list[int]]) -> jax.Array:
        what = seen({name: jnp.asarray([0.3, -1.0]) for name in ("primary", other)}, comparisons(2))
        changed = {other: jnp.ones(2, bool)}
        what = dataclasses.replace(what, changed=changed, lengths=jnp.asarray(lengths))
        terms = find_objective(spec).terms(what)
        return terms.loss - terms.branch_losses["primary"]

    plain = loss(spec, [[3, 1], [1, 4]])
    np.testing.assert_allclose(loss(spec + "+length_residual", [[3, 1], [1, 4]]), plain, atol=1e-6)


def test_normalised_weights_of_no_valid_comparison() -> None:
    found = losses_and_gradients("shortcut_aware:normalise=true", [1.0, -1.0], mask=[False, False])
    assert all(np.all(np.isfinite(x)) for x in found)
