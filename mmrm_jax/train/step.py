"""The train and evaluation steps: pure functions of pytrees, ready for `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmrm_jax.config import BranchInput
from mmrm_jax.models.lora import merge_model
from mmrm_jax.objectives import Objective, Seen, Terms, margins
from mmrm_jax.train.state import HEADS, TrainState, merge_branch
from mmrm_jax.types import NUMBER, Batch, Comparisons, Prefix, PyTree, Responses

SFC_BINS = 40  # histogram bins over (0, 1)

Sums = dict[str, tuple[Array, Array]]  # name -> (sum, count): mergeable, exact under padding and micro-batches


def branch_rewards(
    graphdef: nnx.GraphDef,
    params: dict[str, nnx.State],
    frozen: nnx.State,
    batch: Batch,
    dtype: jnp.dtype,
    keys: Mapping[str, Key[Array, " G_or_1"]] = MappingProxyType({}),
) -> dict[str, Float[Array, "G N"]]:
    """Rewards of every branch in `params`; one in `keys` has drop path in its vision tower, if that has a rate."""
    return {
        branch: merge_model(graphdef, merge_branch(trainable, frozen), dtype).rewards(
            batch.prefixes[branch], batch.responses, dtype, keys.get(branch)
        )
        for branch, trainable in params.items()
    }


def drop_path_keys(
    key: Key[Array, ""], batch: Batch, views: Mapping[str, BranchInput]
) -> dict[str, Key[Array, " G_or_1"]]:
    """A key for every group of every branch with an image; one for all groups where they share a blank image.

    A group's draws come from its index in the data: the same for all its responses, and whichever micro-batch, place
    in the batch or device it lands on.
    """
    keys = {}
    for i, branch in enumerate(sorted(views)):
        if batch.prefixes[branch].pixels is not None:
            own = jax.random.fold_in(key, i)
            each = jax.vmap(jax.random.fold_in, (None, 0))
            keys[branch] = own[None] if views[branch] == "blank" else each(own, batch.group_index)
    return keys


def see(
    graphdef: nnx.GraphDef,
    objective: Objective,
    params: dict[str, nnx.State],
    frozen: nnx.State,
    batch: Batch,
    dtype: jnp.dtype,
    key: Key[Array, ""],
    proxy_input: BranchInput,
    carried: Float[Array, " S"] | None = None,
    memory: Float[Array, "T R"] | None = None,
) -> Seen:
    """Run every forward pass of a training step, and bring together what the objective declares to need.

    Random draws depend on `key` and a group's index in the data, as in `drop_path_keys`.
    """
    inputs = objective.inputs(proxy_input)
    dropping = drop_path_keys(key, batch, inputs)
    own = jax.random.fold_in(key, len(inputs))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(own, batch.group_index)
    models = {b: merge_model(graphdef, merge_branch(params[b], frozen), dtype) for b in objective.branches}
    rewards, pooled, changed = {}, {}, {}
    for name, forward in objective.forwards().items():
        source = name if forward.input is not None else forward.branch
        prefix = batch.prefixes[source]
        if forward.change is not None:
            shown = forward.change(prefix, batch, keys)
            prefix, changed[name] = shown, _differs(prefix, shown)
        pooled[name] = models[forward.branch].pooled(prefix, batch.responses, dtype, dropping.get(source))
        rewards[name] = models[forward.branch].score_of(pooled[name])
    heads = {}
    if objective.heads:
        heads = {name: jax.tree.leaves(params[HEADS][name])[0] for name in objective.heads}
        heads["score"] = models[objective.scores].score[...][:, None]
    pooled = {branch: pooled[branch] for branch in objective.pooled}
    lengths = response_lengths(batch.responses)
    known = None if memory is None else memory[_numbers(batch.comparisons)]
    return Seen(rewards, batch.comparisons, lengths, pooled, heads, changed, carried, known, keys)


def _numbers(comparisons: Comparisons) -> Int[Array, " C"]:
    return comparisons.given[NUMBER].astype(jnp.int32)


def _learnt(terms: Terms, comparisons: Comparisons, memory: Array | None) -> Array | None:
    """What a batch adds to the memory of all comparisons, and in a last column how often each was seen: sums, which
    those of micro-batches add up to."""
    if memory is None:
        return None
    assert terms.memory is not None
    where = _numbers(comparisons)
    there = comparisons.mask[:, None]
    new = jnp.where(there, jax.lax.stop_gradient(terms.memory) - memory[where], 0.0)
    seen = jnp.concatenate([new, there.astype(memory.dtype)], axis=1)
    return jnp.zeros((len(memory), seen.shape[1])).at[where].add(seen)


def _remembered(memory: Array | None, learnt: Array | None) -> Array | None:
    """The memory after a batch: of a comparison that it has several times, the mean of what each would leave."""
    if memory is None or learnt is None:
        return None
    return memory + learnt[:, :-1] / jnp.maximum(learnt[:, -1:], 1.0)


def response_lengths(responses: Responses) -> Int[Array, "G N"]:
    """Tokens of each response, with those that all of its group begin with; 0 where there is none."""
    positions = responses.positions.reshape(len(responses.positions), -1)
    last = jnp.take_along_axis(positions, jnp.maximum(responses.last, 0), axis=1)
    return jnp.where(responses.last >= 0, responses.opening[:, None] + last + 1, 0)


def _differs(a: Prefix, b: Prefix) -> Bool[Array, " G"]:
    """Whether two prefixes show a group another image."""
    images = [p.pixels if p.features is None else p.features for p in (a, b)]
    if images[0] is None or images[1] is None:
        return jnp.zeros(len(a.lengths), bool)
    return jnp.any((images[0] != images[1]).reshape(len(a.lengths), -1), axis=1)


def _sums(terms: Terms, branch_margins: dict[str, Array], batch: Batch) -> Sums:
    """Metrics as (sum, count) over valid comparisons; accuracy leaves out labels that are ties."""
    mask = batch.comparisons.mask.astype(jnp.float32)
    decided = mask * ~batch.comparisons.tie
    count = jnp.sum(mask)
    sums: Sums = {"loss": (jnp.sum(terms.loss * mask), count)}
    for branch, d in branch_margins.items():
        correct = jnp.where(d > 0, 1.0, jnp.where(d == 0, 0.5, 0.0))
        sums[f"{branch}/loss"] = (jnp.sum(terms.branch_losses[branch] * mask), count)
        sums[f"{branch}/accuracy"] = (jnp.sum(correct * decided), jnp.sum(decided))
        sums[f"{branch}/margin"] = (jnp.sum(d * mask), count)
    if terms.sfc is not None:
        bins = jnp.clip(jnp.floor(terms.sfc * SFC_BINS), 0, SFC_BINS - 1)
        histogram = jnp.sum(mask[:, None] * (bins[:, None] == jnp.arange(SFC_BINS, dtype=jnp.float32)[None]), axis=0)
        sums["sfc"] = (jnp.sum(terms.sfc * mask), count)
        sums["sfc/histogram"] = (histogram, count)
    return sums


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype,
    proxy_input: BranchInput = "absent",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """`step(state, batch [M, ...]) -> (state, metrics)`: one optimiser step, the same for any M.

    Drop path draws from the state's seed and step, so that a resumed run draws what an uninterrupted one does.

    The loss is the mean over all valid comparisons of the whole batch: micro-batches add up gradients of sums, and
    one division by the total count follows. Metrics are means over "comparisons", accuracies over those of them that
    are "decided" and not ties (0 where there is none); "sfc/histogram" is counts.
    """

    def loss_sum(
        params: dict[str, nnx.State], state: TrainState, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Sums, Array | None, Array | None]]:
        seen = see(
            graphdef, objective, params, state.frozen, batch, dtype, key, proxy_input, state.carried, state.memory
        )
        with jax.named_scope("objective"):
            terms = objective.terms(seen)
            sums = _sums(terms, {b: seen.margin(b) for b in objective.branches}, batch)
            learnt = _learnt(terms, batch.comparisons, state.memory)
        return sums["loss"][0], (sums, terms.state, learnt)

    def micro(state: TrainState, batch: Batch) -> tuple[PyTree, tuple[Sums, Array | None, Array | None]]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        return jax.grad(loss_sum, has_aux=True)(state.params, state, batch, key)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        first = jax.tree.map(lambda x: x[0], batch)
        if batch.group_index.shape[0] == 1:
            total = micro(state, first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, state, first))
            total, _ = jax.lax.scan(lambda t, b: (jax.tree.map(jnp.add, t, micro(state, b)), None), zeros, batch)
        grads, (sums, carried, learnt) = total
        count = jnp.maximum(sums["loss"][1], 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(jnp.add, state.params, updates)
        metrics = {k: s if k.endswith("histogram") else s / jnp.maximum(c, 1.0) for k, (s, c) in sums.items()}
        metrics |= {"comparisons": sums["loss"][1], "decided": sums[f"{objective.scores}/accuracy"][1]}
        metrics["grad_norm"] = optax.tree.norm(grads)
        kept = {"carried": carried, "memory": _remembered(state.memory, learnt)}
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1, **kept), metrics

    return step


def make_eval_step(
    graphdef: nnx.GraphDef, objective: Objective, dtype: jnp.dtype
) -> Callable[[dict[str, nnx.State], nnx.State, Batch], dict[str, Array]]:
    """`step(params, frozen, batch) -> arrays`: rewards [G, N] and margins [C] per branch, and SFC [C] where used."""

    def step(params: dict[str, nnx.State], frozen: nnx.State, batch: Batch) -> dict[str, Array]:
        branches = {b: params[b] for b in objective.branches}
        rewards = branch_rewards(graphdef, branches, frozen, batch, dtype)
        branch_margins = {b: margins(r, batch.comparisons) for b, r in rewards.items()}
        out = {f"{b}/rewards": r for b, r in rewards.items()} | {f"{b}/margins": d for b, d in branch_margins.items()}
        return out if objective.weigh is None else out | {"sfc": objective.weigh(branch_margins, batch.comparisons)}

    return step


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in a tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
