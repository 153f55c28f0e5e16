"""Objectives against numbers worked out by hand, and what their gradients may and may not touch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import MODEL, flat, make_batch, one_micro, random_group, random_params

from mmrm_jax.ablate.two_features import accuracy, fit, two_feature_world
from mmrm_jax.objectives import (
    Objective,
    Seen,
    bradley_terry,
    image_only,
    margins,
    shortcut_aware,
    shortcut_failure_coefficient,
    standard,
    text_only,
)
from mmrm_jax.objectives.shortcut import EPSILON
from mmrm_jax.train.state import abstract_model, split_params
from mmrm_jax.train.step import branch_rewards
from mmrm_jax.types import Comparison, Comparisons

LN2 = math.log(2)


def comparisons(n: int, *, index=None, margin=None, tie=None, mask=None) -> Comparisons:
    return Comparisons(
        jnp.asarray([[2 * c, 2 * c + 1] for c in range(n)] if index is None else index, jnp.int32),
        jnp.zeros(n) if margin is None else jnp.asarray(margin, jnp.float32),
        jnp.zeros(n, bool) if tie is None else jnp.asarray(tie),
        jnp.ones(n, bool) if mask is None else jnp.asarray(mask),
    )


def seen(margins_by_branch, c: Comparisons) -> Seen:
    """Rewards (d, 0) of pairs, whose margins are exactly these."""
    rewards = {b: jnp.stack([d, jnp.zeros_like(d)], axis=1) for b, d in margins_by_branch.items()}
    index = jnp.arange(2 * len(c.mask), dtype=jnp.int32).reshape(-1, 2)
    return Seen(rewards, dataclasses.replace(c, index=index))


def both(function, *args):
    """The result, which must not depend on compilation."""
    plain, jitted = function(*args), jax.jit(function)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), plain, jitted)
    return jitted


@pytest.mark.usefixtures("strict_numerics")
class TestBradleyTerry:
    def test_margins_index_the_flattened_responses(self) -> None:
        rewards = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
        c = comparisons(4, index=[[2, 0], [0, 1], [3, 5], [1, 4]])  # the last one joins two groups
        np.testing.assert_array_equal(both(margins, rewards, c), [3.0, -1.0, -24.0, -14.0])

    def test_by_hand(self) -> None:
        # softplus(-d): d = 0 -> ln 2; d = ln 3 -> ln(1 + 1/3) = ln(4/3); d = -ln 3 -> ln 4
        d = jnp.log(jnp.array([1.0, 3.0, 1 / 3]))
        expected = [LN2, math.log(4 / 3), math.log(4)]
        np.testing.assert_allclose(both(bradley_terry, d, comparisons(3)), expected, rtol=1e-6)

    def test_target_margin_by_hand(self) -> None:
        # m = ln 3 asks for odds three times as large: d = ln 3 is then only even, ln 2; d = 0 costs ln(1 + 3)
        d, c = jnp.log(jnp.array([3.0, 1.0])), comparisons(2, margin=np.log([3.0, 3.0]))
        np.testing.assert_allclose(both(bradley_terry, d, c), [LN2, math.log(4)], rtol=1e-6)

    def test_tie_by_hand(self) -> None:
        # Half of each order: d = 0 -> ln 2; d = +-ln 3 -> (ln(4/3) + ln 4) / 2. A tie's margin means nothing.
        d, c = jnp.log(jnp.array([1.0, 3.0, 1 / 3])), comparisons(3, tie=[True] * 3, margin=[5.0] * 3)
        half = (math.log(4 / 3) + math.log(4)) / 2
        np.testing.assert_allclose(both(bradley_terry, d, c), [LN2, half, half], rtol=1e-6)
        # d/dd = (sigmoid(d) - sigmoid(-d)) / 2: pulls towards no difference. At d = ln 3: (3/4 - 1/4) / 2 = 1/4
        slope = jax.grad(lambda d: jnp.sum(bradley_terry(d, c)))(d)
        np.testing.assert_allclose(slope, [0.0, 0.25, -0.25], atol=1e-6)

    def test_extreme_margins_are_finite(self) -> None:
        d, c = jnp.array([1e4, -1e4]), comparisons(2)
        np.testing.assert_allclose(both(bradley_terry, d, c), [0.0, 1e4])
        np.testing.assert_allclose(jax.grad(lambda d: jnp.sum(bradley_terry(d, c)))(d), [0.0, -1.0])


@pytest.mark.usefixtures("strict_numerics")
class TestShortcutFailureCoefficient:
    def test_by_hand(self) -> None:
        d = jnp.log(jnp.array([1.0, 3.0, 1 / 3, 3.0]))
        b = jnp.log(jnp.array([1.0, 1 / 3, 3.0, 3.0]))
        # L = ln 2, ln 4/3, ln 4, ln 4/3 and Lt = ln 2, ln 4, ln 4/3, ln 4/3. Then Lt / (Lt + L):
        # ln 2 / (2 ln 2) = 1/2; ln 4 / (ln 4 + ln 4/3) = 1.38629 / 1.67398 = 0.82814; 1 - 0.82814; 1/2
        terms = both(lambda d, b: _weights(d, b), d, b)
        np.testing.assert_allclose(terms, [0.5, 0.82814, 0.17186, 0.5], atol=1e-5)

    def test_epsilon_by_hand(self) -> None:
        # With eps = 1/2: 1/4 + Lt / (1/2 + Lt + L). Lt = 1, L = 1/2: 1/4 + 1/2; Lt = 0: 1/4; L = 0, Lt = 3/2: 1/4 + 3/4
        primary, proxy = jnp.array([0.5, 1.0, 0.0]), jnp.array([1.0, 0.0, 1.5])
        sfc = both(lambda x, y: shortcut_failure_coefficient(x, y, 0.5), primary, proxy)
        np.testing.assert_allclose(sfc, [0.75, 0.25, 1.0], rtol=1e-6)

    def test_no_loss_at_all_is_not_nan(self) -> None:
        # Both branches certain and right: L = Lt = 0 leaves eps/2; the authors' epsilon
        sfc = shortcut_failure_coefficient(jnp.zeros(1), jnp.zeros(1))
        np.testing.assert_allclose(sfc, [EPSILON / 2], rtol=1e-6)
        assert EPSILON == 1e-7

    def test_direction(self) -> None:
        # Towards 1 where the proxy is wrong and the primary right, towards 0 the other way round
        sfc = _weights(jnp.array([9.0, -9.0]), jnp.array([-9.0, 9.0]))
        assert sfc[0] > 0.9999
        assert sfc[1] < 0.0001


def _weights(d: jax.Array, b: jax.Array) -> jax.Array:
    sfc = shortcut_aware().terms(seen({"primary": d, "proxy": b}, comparisons(len(d)))).sfc
    assert sfc is not None
    return sfc


def test_no_gradient_passes_through_the_weights() -> None:
    rng = np.random.default_rng(0)
    d, b = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(2))
    c = comparisons(6, margin=rng.normal(size=6), tie=[False] * 4 + [True] * 2)
    loss = lambda d, b: jnp.sum(shortcut_aware().terms(seen({"primary": d, "proxy": b}, c)).loss)  # noqa: E731
    by_d, by_b = jax.grad(loss, argnums=(0, 1))(d, b)

    sfc = np.asarray(shortcut_aware().terms(seen({"primary": d, "proxy": b}, c)).sfc, np.float64)

    def softplus(x):
        return np.logaddexp(0.0, x)

    def frozen(d, b):
        m, tie = np.asarray(c.margin, np.float64), np.asarray(c.tie)
        own = lambda x: np.where(tie, (softplus(x) + softplus(-x)) / 2, softplus(-(x - m)))  # noqa: E731
        return np.sum(sfc * own(d) + own(b))

    x, h = np.concatenate([d, b]).astype(np.float64), 1e-5
    steps = np.eye(12) * h
    numeric = [(frozen(*np.split(x + s, 2)) - frozen(*np.split(x - s, 2))) / (2 * h) for s in steps]
    np.testing.assert_allclose(np.concatenate([by_d, by_b]), numeric, atol=1e-6)


def test_each_branch_learns_from_its_own_term() -> None:
    rng = np.random.default_rng(1)
    d, b = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(2))
    c = comparisons(5)
    loss = lambda d, b: jnp.sum(shortcut_aware().terms(seen({"primary": d, "proxy": b}, c)).loss)  # noqa: E731
    by_d, by_b = jax.grad(loss, argnums=(0, 1))(d, b)
    # The proxy's gradient is -sigmoid(-b), whatever the primary says; the primary's is -SFC * sigmoid(-d).
    np.testing.assert_allclose(by_b, -jax.nn.sigmoid(-b), rtol=1e-6)
    np.testing.assert_array_equal(by_b, jax.grad(loss, argnums=1)(d + 3.0, b))
    np.testing.assert_allclose(by_d, -_weights(d, b) * jax.nn.sigmoid(-d), rtol=1e-6)


def test_objectives_and_their_branches() -> None:
    assert standard().views("absent") == {"primary": "multimodal"}
    assert text_only().views("blank") == {"proxy": "blank"}
    assert image_only().views("absent") == {"image": "image_only"}
    assert shortcut_aware().views("absent") == {"primary": "multimodal", "proxy": "absent"}
    assert [o().scores for o in (standard, text_only, image_only, shortcut_aware)] == [
        *("primary", "proxy", "image", "primary")
    ]


# --- through the whole model ----------------------------------------------------------------------------------------


def gradient_function(objective: Objective, frozen: nnx.State) -> Callable:
    """(parameters by branch, batch, weights) -> d(sum of weights * loss) / d parameters, and the SFC."""
    graphdef, _ = abstract_model(MODEL)

    def loss(params, batch, weights):
        rewards = branch_rewards(graphdef, params, frozen, batch, jnp.dtype("float32"))
        terms = objective.terms(Seen(rewards, batch.comparisons))
        return jnp.sum(terms.loss * weights), terms.sfc

    # Operation by operation: compiled as a whole, the order of sums would be another for each program and CPU.
    return jax.grad(loss, has_aux=True)


def test_gradients_through_the_model_stay_in_their_branch() -> None:
    rng = np.random.default_rng(3)
    won = [(Comparison(0, 1), Comparison(2, 0, margin=0.5)), (Comparison(1, 2, tie=True),), (Comparison(2, 1),)]
    groups = [random_group(MODEL, rng, i, tiles=1 + i % 2, responses=3, comparisons=c) for i, c in enumerate(won)]
    batch = jax.tree.map(jnp.asarray, one_micro(make_batch(groups, MODEL, num_groups=4)))
    mask = batch.comparisons.mask.astype(np.float32)
    views = shortcut_aware().views("absent")
    params, frozen = split_params(random_params(MODEL, 4), views, ("vision",))
    other, _ = split_params(random_params(MODEL, 5), views, ("vision",))
    params["proxy"] = other["proxy"]

    run = gradient_function(shortcut_aware(), frozen)
    grads, sfc = run(params, batch, mask)
    assert not any(name.startswith(("vision", "projector")) for name in flat(grads["proxy"]))
    # Another primary, the same proxy: not a bit of the proxy's gradient changes.
    moved, _ = run({"primary": other["primary"], "proxy": params["proxy"]}, batch, mask)
    jax.tree.map(np.testing.assert_array_equal, moved["proxy"], grads["proxy"])

    proxy_alone, _ = gradient_function(text_only(), frozen)({"proxy": params["proxy"]}, batch, mask)
    primary_alone, _ = gradient_function(standard(), frozen)({"primary": params["primary"]}, batch, mask * sfc)
    for branch, alone in (("proxy", proxy_alone), ("primary", primary_alone)):
        want = flat(alone[branch])
        for name, got in flat(grads[branch]).items():
            assert np.any(got), name
            np.testing.assert_allclose(got, want[name], rtol=0, atol=1e-6 * np.abs(want[name]).max(), err_msg=name)


def test_padding_comparisons_contribute_nothing() -> None:
    index, mask = [[0, 1], [3, 2], [0, 0], [0, 0]], [True, True, False, False]
    rewards = {"primary": jnp.array([[1.0, 0.2], [0.3, 0.4]]), "proxy": jnp.array([[0.0, 0.5], [-0.3, 0.4]])}

    def mean(rewards, c):
        terms = shortcut_aware().terms(Seen(rewards, c))
        return jnp.sum(terms.loss * c.mask) / jnp.sum(c.mask)

    padded, tight = comparisons(4, index=index, mask=mask), comparisons(2, index=index[:2])
    got, want = (jax.value_and_grad(mean)(rewards, c) for c in (padded, tight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


# --- the two-feature table of METHOD.md -----------------------------------------------------------------------------


def test_the_accuracy_of_the_two_feature_model_is_that_of_draws() -> None:
    """Weights of any sign: against the image too, which is what labels that go against it teach."""
    rng = np.random.default_rng(0)
    for cue, image, agree, mu, against in (
        (0.4, -0.43, 0.6, 1.0, 0.7),
        (0.0, -1.0, 0.5, 1.0, 0.0),
        (2.0, 0.5, 0.9, 2, 0.1),
    ):
        c = np.where(rng.random(400_000) < agree, 1.0, -1.0)
        sign = np.where(rng.random(400_000) < against, -1.0, 1.0)
        drawn = np.mean(cue * c + image * (sign * mu + rng.standard_normal(400_000)) > 0)
        assert accuracy(np.asarray([cue, image]), agree, mu, against) == pytest.approx(drawn, abs=4e-3)
    assert accuracy(np.asarray([1.0, 0.0]), 0.8, 1.0, 0.1) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("agree", "mu", "against_image", "standard_row", "shortcut_row"),
    [
        (0.9, 1.0, 0.0, (92.9, 51.6), (89.1, 76.7)),
        (0.9, 2.0, 0.1, (90.0, 41.7), (89.4, 94.4)),
        (0.97, 2.0, 0.1, (96.9, 4.5), (90.1, 92.0)),
        (0.9, 4.0, 0.0, (100.0, 100.0), (100.0, 100.0)),
    ],
)
def test_two_feature_table(
    agree: float, mu: float, against_image: float, standard_row: tuple, shortcut_row: tuple
) -> None:
    """METHOD.md's table: i.i.d. with the training labels, reversed with labels that follow the image.

    The integrals here are exact; the table's numbers come from a sample, and lie within 0.5 of them."""
    world = two_feature_world(agree, mu, against_image)
    for objective, row in ((standard(), standard_row), (shortcut_aware(), shortcut_row)):
        (weights,) = fit(objective, [world])
        if objective.name == "standard" and against_image == 0.0 and mu < 2:
            # Then the logistic model is the true posterior: log odds ln(p / (1 - p)) of the cue, 2 mu of the image.
            np.testing.assert_allclose(weights, [math.log(agree / (1 - agree)), 2 * mu], atol=2e-3)
        iid = 100 * accuracy(weights, agree, mu, against_image)
        reversed_cue = 100 * accuracy(weights, 1 - agree, mu, 0.0)
        assert (iid, reversed_cue) == pytest.approx(row, abs=0.5), objective.name
