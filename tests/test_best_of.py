"""Best of n by enumeration, its divergence and intervals; a policy's path by hand; candidates of the shapes world."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mmrm_jax.ablate.policy import policy_path
from mmrm_jax.data.shapes import FILLERS, VALUES, sample_candidates
from mmrm_jax.eval.best_of import best_of_curve, best_of_kl, best_of_weights, doubling, expected_best

pytestmark = pytest.mark.usefixtures("one_device")


def by_enumeration(rewards: np.ndarray, values: np.ndarray, n: int) -> float:
    """The mean over all n of the responses; of several best, the mean of these."""
    found = []
    for chosen in map(list, itertools.combinations(range(len(rewards)), n)):
        best = [i for i in chosen if rewards[i] == rewards[chosen].max()]
        found.append(values[best].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("seed", range(5))
def test_expected_best_is_the_mean_over_all_draws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 8))
    rewards = rng.integers(0, 4, count).astype(float) if seed % 2 else rng.normal(size=count)
    values = rng.normal(size=count)
    ns = list(range(1, count + 1))
    found = expected_best(rewards, values, ns)
    np.testing.assert_allclose(found, [by_enumeration(rewards, values, n) for n in ns], rtol=1e-12, atol=1e-12)
    assert found[0] == pytest.approx(values.mean())
    own = expected_best(rewards, rewards, ns)
    assert np.all(np.diff(own) >= -1e-12) and own[-1] == pytest.approx(rewards.max())


def test_weights_of_many_add_up_to_one() -> None:
    for count, n in ((1, 1), (1000, 1), (1000, 999), (1000, 1000), (5000, 64)):
        weights = best_of_weights(count, n)
        assert weights.sum() == pytest.approx(1, abs=1e-9) and np.all(np.diff(weights) <= 0)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n is {n}; it must be from 1 to 3"):
            best_of_weights(3, n)


def test_divergence_by_hand() -> None:
    assert best_of_kl(1) == 0 and best_of_kl(2) == pytest.approx(math.log(2) - 0.5)
    # Of a policy with very many responses: the density of the best at quantile u is n u^(n-1), and its entropy that.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (3, 64):
        density = n * u ** (n - 1)
        assert best_of_kl(n) == pytest.approx(np.mean(density * (np.log(n) + (n - 1) * np.log(u))), rel=1e-4)
    assert doubling(6) == [1, 2, 4, 6] and doubling(8) == [1, 2, 4, 8] and doubling(1) == [1]


def test_a_curve_has_intervals_over_prompts() -> None:
    rng = np.random.default_rng(0)
    rewards = [rng.normal(size=n) for n in (4, 5, 6)] * 20
    gold = [(r > 0).astype(float) for r in rewards]
    curve = best_of_curve(rewards, {"gold": gold, "reward": rewards}, [1, 2, 4])
    assert curve.kl == [best_of_kl(n) for n in (1, 2, 4)]
    means = [point["mean"] for point in curve.values["gold"]]
    by_hand = np.mean([expected_best(r, g, [1, 2, 4]) for r, g in zip(rewards, gold, strict=True)], axis=0)
    np.testing.assert_allclose(means, by_hand)
    for point in (p for points in curve.values.values() for p in points):
        assert point["low"] <= point["mean"] <= point["high"]  # type: ignore[operator]


def test_a_policy_goes_where_the_reward_says() -> None:
    # Two responses, one feature, reward 1 for the first: pi = sigmoid(w), and its gradient is pi (1 - pi) / 0.5.
    features = np.asarray([[[1.0], [0.0]]])
    reward = np.asarray([[1.0, 0.0]])
    path = policy_path(features, reward, {"reward": reward, "other": 1 - reward}, steps=2, rate=0.5)
    w, by_hand = 0.0, []
    for _ in range(3):
        p = 1 / (1 + math.exp(-w))
        by_hand.append((p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)), p))
        w += 0.5 * 2 * p * (1 - p)
    np.testing.assert_allclose(np.stack([path.kl, path.values["reward"]], axis=1), by_hand, atol=1e-6)
    np.testing.assert_allclose(path.values["other"], 1 - path.values["reward"], atol=1e-6)
    # A reward that says nothing moves nothing; the scale of a reward changes nothing.
    still = policy_path(features, np.ones((1, 2)), {"reward": reward}, steps=3)
    assert np.all(still.kl == 0)
    large = policy_path(features, 1000 * reward, {"other": 1 - reward}, steps=2, rate=0.5)
    np.testing.assert_allclose(large.kl, path.kl, rtol=1e-5)


def test_candidates_are_what_they_say() -> None:
    asked = [sample_candidates(np.random.default_rng(i), 64) for i in range(12)]
    for c in asked:
        assert len(c.responses) == len(c.right) == len(c.style) == 64
        for response, style in zip(c.responses, c.style, strict=True):
            assert any(filler in response for filler in FILLERS) == (style == "long")
        # Whatever is asked, right answers name one value of it, and no wrong answer gives all the right ones.
        named = [frozenset(v for values in VALUES.values() for v in values if v in r.lower()) for r in c.responses]
        right = {words for words, true in zip(named, c.right, strict=True) if true}
        assert not right & {words for words, true in zip(named, c.right, strict=True) if not true}
    assert np.mean([c.right for c in asked]) == pytest.approx(0.5, abs=0.06)
    assert sample_candidates(np.random.default_rng(0), 64).responses == asked[0].responses
