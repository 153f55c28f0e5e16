"""Best of n: what a reward picks among n responses to a prompt, how far from the policy that is, what it is worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mmrm_jax.eval.metrics import bootstrap_sums, interval, named_rng

RESAMPLES = 1000


def best_of_kl(n: int) -> float:
    """ln n - (n - 1) / n, in nats: the KL divergence of best-of-n from the policy that it draws from.

    Stiennon et al. 2020, arXiv 2009.01325, appendix G.3. Of a policy whose draws are not all distinct to the reward it
    is an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_weights(count: int, n: int) -> Float[np.ndarray, " count"]:
    """How often the response at each rank of `count`, from the best on, is the best of n drawn without replacement.

    C(count - 1 - rank, n - 1) / C(count, n), which makes any mean under it an unbiased estimate for n fresh draws.
    """
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}; it must be from 1 to {count}, the number of responses")
    ranks = np.arange(count - 1)
    ratios = np.maximum(count - n - ranks, 0) / (count - 1 - ranks)
    return n / count * np.concatenate([[1.0], np.cumprod(ratios)])


def expected_best(
    rewards: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"], ns: Sequence[int]
) -> Float[np.ndarray, " K"]:
    """The expected value of the response that `rewards` would pick among n, for every n of `ns`.

    Of responses with equal rewards any is picked as often as another.
    """
    _, place, counts = np.unique(-rewards, return_inverse=True, return_counts=True)
    tied = np.bincount(place, weights=values) / counts  # the mean value of each distinct reward, from the best on
    ranked = np.repeat(tied, counts)
    return np.asarray([best_of_weights(len(rewards), n) @ ranked for n in ns])


def doubling(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    return sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})


@dataclasses.dataclass(frozen=True)
class Curve:
    """Means over prompts for every n, with 95 % bootstrap intervals over prompts: {"mean", "low", "high"} by name."""

    ns: list[int]
    kl: list[float]
    values: dict[str, list[dict[str, float | None]]]


def best_of_curve(
    rewards: Sequence[Float[np.ndarray, " N"]],
    values: Mapping[str, Sequence[Float[np.ndarray, " N"]]],
    ns: Sequence[int],
) -> Curve:
    """What `rewards` would pick among n responses to each prompt, measured by each of `values`."""
    found = {}
    for name, by_prompt in values.items():
        expected = np.stack([expected_best(r, v, ns) for r, v in zip(rewards, by_prompt, strict=True)])
        means = bootstrap_sums(expected, named_rng("best of n"), RESAMPLES) / len(expected)
        limits = [interval(column[1:]) for column in means.T]
        found[name] = [
            {"mean": float(mean), "low": low, "high": high} for mean, (low, high) in zip(means[0], limits, strict=True)
        ]
    return Curve(list(ns), [best_of_kl(n) for n in ns], found)
