"""What an objective is: which branches it trains on which input, and a pure function of their margins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmrm_jax.config import BranchInput
from mmrm_jax.types import Comparisons

Margins = Mapping[str, Float[Array, " C"]]


@dataclasses.dataclass(frozen=True)
class Terms:
    """Unreduced results, one entry per comparison; reduction is a (sum, count) over the comparisons' mask.

    `branch_losses` are each branch's own Bradley-Terry loss; `sfc` the Shortcut-Failure Coefficient, where used.
    """

    loss: Float[Array, " C"]
    branch_losses: dict[str, Float[Array, " C"]]
    sfc: Float[Array, " C"] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """One way to train.

    branches: branch -> its input; "proxy" stands for the configured text-only input (`absent` or `blank`).
    scores: the branch whose rewards the trained model gives.
    terms: margins by branch and the comparisons -> unreduced losses.
    """

    name: str
    branches: Mapping[str, str]
    scores: str
    terms: Callable[[Margins, Comparisons], Terms]

    def views(self, proxy_input: BranchInput) -> dict[str, BranchInput]:
        """Branch -> what it sees, with the text-only input filled in."""
        return {b: proxy_input if v == "proxy" else v for b, v in self.branches.items()}  # type: ignore[misc]


def margins(rewards: Float[Array, "G N"], comparisons: Comparisons) -> Float[Array, " C"]:
    """d = r(winner) - r(loser) of every comparison."""
    flat = rewards.reshape(-1)
    return flat[comparisons.index[:, 0]] - flat[comparisons.index[:, 1]]


def bradley_terry(d: Float[Array, " C"], comparisons: Comparisons) -> Float[Array, " C"]:
    """-log P(winner preferred) under Bradley & Terry (1952): softplus(-(d - m)) with target margin m.

    For a tie it is the cross-entropy to P = 1/2, the mean of both orders; a tie has no margin.
    """
    wins = jax.nn.softplus(-(d - comparisons.margin))
    tied = 0.5 * (jax.nn.softplus(-d) + jax.nn.softplus(d))
    return jnp.where(comparisons.tie, tied, wins)
