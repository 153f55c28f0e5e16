"""A trained state on a data set: every comparison's margins, for every branch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from mmrm_jax.data.buckets import Buckets
from mmrm_jax.data.pipeline import EncodedSource, ListPlan, MakeBatch, batches
from mmrm_jax.data.sources import ViewSource, identities
from mmrm_jax.distributed import own_file
from mmrm_jax.sharding import batch_share, gather, whole_batch
from mmrm_jax.train.program import Program
from mmrm_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results in the order of the data: one entry per comparison, except the mean rewards.

    `group` is the group's index in the data set; `winner` and `loser` index its responses. `margins[branch]` are
    float32, `sfc` is present for objectives that use it, `mean_reward[branch]` averages over all responses.
    """

    group: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    tie: np.ndarray
    margins: dict[str, np.ndarray]
    sfc: np.ndarray | None
    mean_reward: dict[str, float]


def evaluate(
    program: Program,
    state: TrainState,
    data: EncodedSource,
    buckets: Buckets,
    *,
    batch_size: int,
    quarantine: Path | None = None,
    strict: bool = False,
    only: np.ndarray | None = None,
) -> Evaluation:
    """Run the evaluation step over a whole data set, or `only` the groups at these positions, bucket by bucket.

    `batch_size` is rounded up to a multiple of the devices. Of several processes each reads its share and gets all
    results. Groups that cannot be read go to this process's own
    file in place of `quarantine`; with `strict` the first of them raises DataError.
    """
    share, shares = batch_share(program.mesh)
    batch_size = whole_batch(batch_size, program.mesh)
    quarantine = None if quarantine is None else own_file(quarantine)
    make = MakeBatch(data, buckets, batch_size, quarantine=quarantine, strict=strict, share=share, shares=shares)
    columns: dict[str, list[np.ndarray]] = {}
    rewards: dict[str, list[np.ndarray]] = {}
    positions = np.arange(len(data)) if only is None else only
    order = positions[np.argsort([buckets.of(data.shapes[i]) for i in positions], kind="stable")]
    for stacked in batches(ListPlan(order.tolist(), batch_size), make):
        batch = program.put(jax.tree.map(lambda x: x[0], stacked), micro=False)
        out = program.eval_step(state.params, state.frozen, batch)
        seen = (batch.comparisons, batch.group_index, batch.responses.last)
        out, (comparisons, group_index, last) = gather((out, seen), program.mesh)
        group, local = np.divmod(comparisons.index, last.shape[1])
        rows = {
            "group": group_index[group[:, 0]],
            "winner": local[:, 0],
            "loser": local[:, 1],
            "tie": comparisons.tie,
        }
        rows |= {k: v for k, v in out.items() if not k.endswith("/rewards")}
        for name, values in rows.items():
            columns.setdefault(name, []).append(values[comparisons.mask])
        for branch in program.objective.branches:
            rewards.setdefault(branch, []).append(out[f"{branch}/rewards"][last >= 0])
    joined = {k: np.concatenate(v) for k, v in columns.items()}
    by_group = np.argsort(joined["group"], kind="stable")
    joined = {k: v[by_group] for k, v in joined.items()}
    return Evaluation(
        group=joined["group"],
        winner=joined["winner"],
        loser=joined["loser"],
        tie=joined["tie"],
        margins={b: joined[f"{b}/margins"] for b in program.objective.branches},
        sfc=joined.get("sfc"),
        mean_reward={b: float(np.concatenate(r).mean(dtype=np.float64)) for b, r in rewards.items()},
    )


def image_clusters(data: EncodedSource, numbers: dict[str, int] | None = None) -> np.ndarray:
    """A number per group, int [groups], that groups share which show the same image (or, without one, prompt).

    `numbers` are those that other data has given out, to which this data adds its own.
    """
    numbers = {} if numbers is None else numbers
    shown = identities(ViewSource(data.source, data.kept))
    return np.asarray([numbers.setdefault(identity, len(numbers)) for identity in shown])
