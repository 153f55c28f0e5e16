"""What an objective is: the branches it trains, what else it needs, and a pure function of what they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmrm_jax.config import BranchInput, TrainConfig
from mmrm_jax.types import ENVIRONMENT, Batch, Comparisons, Prefix

Margins = Mapping[str, Float[Array, " C"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What the step gives an objective: of a batch of G groups of up to N responses, and C comparisons.

    Attributes:
        rewards: Forward pass -> float32 rewards; those of padding responses have no meaning. Every branch on its own
            input is a forward pass of the branch's name; `Objective.extra` are the others.
        comparisons: Preferences among the flattened G * N responses.
        lengths: Tokens of each response; 0 where there is none.
        pooled: Branch -> float32 hidden state that the score head reads; of `Objective.pooled` branches.
        heads: Name -> matrix [D, K] of `Objective.heads`; where there are any, "score" [D, 1] is the score head of the
            branch that scores.
        changed: Forward pass with a `change` -> whether that changed what is shown of a group.
        state: What `Terms.state` was after the last step; `Objective.state` before the first.
        memory: What `Terms.memory` was when each comparison was last seen; 0 before that.
        keys: One for each group, for the draws of this step.
    """

    rewards: Mapping[str, Float[Array, "G N"]]
    comparisons: Comparisons
    lengths: Int[Array, "G N"] | None = None
    pooled: Mapping[str, Float[Array, "G N D"]] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, Float[Array, "D K"]] = dataclasses.field(default_factory=dict)
    changed: Mapping[str, Bool[Array, " G"]] = dataclasses.field(default_factory=dict)
    state: Float[Array, " S"] | None = None
    memory: Float[Array, "C R"] | None = None
    keys: Key[Array, " G"] | None = None

    def margin(self, forward: str) -> Float[Array, " C"]:
        """d = r(winner) - r(loser) of every comparison, in one forward pass."""
        return margins(self.rewards[forward], self.comparisons)

    def loss(self, forward: str) -> Float[Array, " C"]:
        """The Bradley-Terry loss of one forward pass."""
        return bradley_terry(self.margin(forward), self.comparisons)

    def pairs(self, by_response: Array) -> tuple[Array, Array]:
        """(the winner's, the loser's) of values [G, N, ...], each [C, ...]."""
        flat = by_response.reshape(-1, *by_response.shape[2:])
        return flat[self.comparisons.index[:, 0]], flat[self.comparisons.index[:, 1]]

    def group(self) -> Int[Array, " C"]:
        """The group of every comparison's winner."""
        return self.comparisons.index[:, 0] // next(iter(self.rewards.values())).shape[1]

    def environment(self) -> Int[Array, " C"]:
        """The environment of every comparison, from 0; of an objective that asks for `environments`."""
        return self.comparisons.given[ENVIRONMENT].astype(jnp.int32)

    def mean(self, values: Float[Array, " C"], where: Bool[Array, " C"] | None = None) -> Float[Array, ""]:
        """The mean over valid comparisons (of those in `where`); 0 where there is none."""
        mask = self.comparisons.mask if where is None else self.comparisons.mask & where
        counts = mask.astype(values.dtype)
        return jnp.sum(values * counts) / jnp.maximum(jnp.sum(counts), 1.0)


@dataclasses.dataclass(frozen=True)
class Terms:
    """Unreduced results, one entry per comparison; reduction is a (sum, count) over the comparisons' mask.

    `branch_losses` are each branch's own Bradley-Terry loss; `sfc` the Shortcut-Failure Coefficient, where used;
    `state` is what the next step is to see, `memory` what the next that holds the same comparison is to.
    """

    loss: Float[Array, " C"]
    branch_losses: dict[str, Float[Array, " C"]]
    sfc: Float[Array, " C"] | None = None
    state: Float[Array, " S"] | None = None
    memory: Float[Array, "C R"] | None = None


@dataclasses.dataclass(frozen=True)
class Forward:
    """A forward pass of training beside those of all branches on their own input.

    Attributes:
        branch: Whose parameters it has.
        input: What it sees; None is the branch's own input.
        change: (prefix, batch, keys of the groups) -> the prefix that it sees in place of that.
    """

    branch: str
    input: BranchInput | None = None
    change: Callable[[Prefix, Batch, Key[Array, " G"]], Prefix] | None = None


@dataclasses.dataclass(frozen=True)
class Before:
    """A run that comes first, on the same data.

    Attributes:
        objective: What it trains with.
        given: Branches of it whose margins on the training comparisons are in `Comparisons.given`, by branch.
        start: The branch whose parameters this run starts from; None starts from the checkpoint.
        folds: Runs, each on the images of all parts but one: margins then come from the one that has not seen an
            image. 1 is a single run on everything.
        share: Its steps, as a share of the run's own.
    """

    objective: str
    given: tuple[str, ...] = ()
    start: str | None = None
    folds: int = 1
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be above 0 and at most 1")
        if self.folds < 1 or (self.folds > 1 and self.start is not None):
            raise ValueError(f"folds is {self.folds}; it must be at least 1, and 1 where a run starts from another")


@dataclasses.dataclass(frozen=True)
class Objective:
    """One way to train. What it needs beside rewards is declared here; the step computes that and nothing else.

    Attributes:
        name: As configurations and tables have it.
        branches: Branch -> its input; "proxy" stands for the configured text-only input (`absent` or `blank`).
        scores: The branch whose rewards the trained model gives.
        terms: What the forward passes gave -> unreduced losses. It gets gradients through rewards, pooled states and
            heads.
        weigh: Margins by branch, comparisons -> Shortcut-Failure Coefficients, for evaluation.
        extra: Further forward passes in training; one of a branch's name takes the place of that branch's own.
        pooled: Branches of which `terms` reads the hidden state below the score head.
        heads: Name -> K: linear maps [D, K], float32, trained beside the branches and left behind with the proxy; None
            is a K of D.
        state: What `Seen.state` is in the first step, where numbers are carried from step to step; then `couples`.
        remembers: R, the numbers kept of every training comparison from one visit to the next, in `Seen.memory`.
        environments: How many environments `terms` tells apart, by `Seen.environment`; 0 where it does not read them.
        couples: Whether a comparison's loss depends on others of the batch: then micro-batches would change the result.
        before: The run that comes first, if there is one.
        adapt: What it changes of a run's settings, where it trains other parts of the model than they say.
    """

    name: str
    branches: Mapping[str, str]
    scores: str
    terms: Callable[[Seen], Terms]
    weigh: Callable[[Margins, Comparisons], Float[Array, " C"]] | None = None
    extra: Mapping[str, Forward] = dataclasses.field(default_factory=dict)
    pooled: tuple[str, ...] = ()
    heads: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    state: tuple[float, ...] = ()
    remembers: int = 0
    environments: int = 0
    couples: bool = False
    before: Before | None = None
    adapt: Callable[[TrainConfig], TrainConfig] = lambda config: config

    def views(self, proxy_input: BranchInput) -> dict[str, BranchInput]:
        """Branch -> what it sees, with the text-only input filled in."""
        return {b: proxy_input if v == "proxy" else v for b, v in self.branches.items()}  # type: ignore[misc]

    def inputs(self, proxy_input: BranchInput) -> dict[str, BranchInput]:
        """What a training batch holds a prefix of: the branches' views, and forward passes with one of their own."""
        found = self.views(proxy_input)
        for name, forward in self.extra.items():
            if forward.input is not None:
                found[name] = forward.input
        return found

    def forwards(self) -> dict[str, Forward]:
        """Every forward pass of training."""
        return {branch: Forward(branch) for branch in self.branches} | dict(self.extra)


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


def label_probability(d: Float[Array, " C"], comparisons: Comparisons) -> Float[Array, " C"]:
    """How far a margin agrees with the label, from 0 to 1: p = sigmoid(d), P(winner preferred).

    For a tie 2 sqrt(p (1 - p)), which is 1 where no difference is seen.
    """
    return jnp.exp(-surprise(d, comparisons))


def surprise(d: Float[Array, " C"], comparisons: Comparisons) -> Float[Array, " C"]:
    """-log of `label_probability`, from 0 up: softplus(-d), whatever the target margin."""
    tied = 0.5 * (jax.nn.softplus(-d) + jax.nn.softplus(d)) - jnp.log(2.0)
    return jnp.where(comparisons.tie, tied, jax.nn.softplus(-d))
