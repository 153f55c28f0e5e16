"""The train state: plain pytrees, split once from the model definition."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mmrm_jax.config import TEXT_VIEWS, BranchInput, LoraConfig, ModelConfig
from mmrm_jax.models.layers import param
from mmrm_jax.models.lora import check_targets, init_adapters
from mmrm_jax.models.reward import RewardModel
from mmrm_jax.sharding import param_shardings, replicated
from mmrm_jax.types import PyTree

IMAGE_PARTS = ("vision", "projector")
HEADS = "heads"  # in `TrainState.params`, beside the branches: an objective's own heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`params[branch]` is what that branch trains; `frozen` holds, once, what some branch uses and does not train.

    A branch with adapters trains them and its score head: where all have them, the whole trunk is in `frozen`.

    `params["heads"]` are the objective's own, where it has some, `carried` the numbers that it carries from step to
    step, and `memory` [comparisons of the training data, R] those that it keeps of each. `seed`, with `step`, is all
    that a step's random draws depend on.
    """

    params: dict[str, nnx.State]
    frozen: nnx.State
    opt_state: PyTree
    step: jax.Array
    seed: jax.Array
    carried: jax.Array | None = None
    memory: jax.Array | None = None


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph and abstract parameters (float32), without allocating anything."""
    graphdef, treedef, leaves = _traced_model(config)
    return graphdef, jax.tree.unflatten(treedef, leaves)


@functools.lru_cache(maxsize=8)
def _traced_model(config: ModelConfig) -> tuple[nnx.GraphDef, Any, list[jax.ShapeDtypeStruct]]:
    """What `abstract_model` is made of: tracing takes a fifth of a second, and a command asks several times."""
    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(nnx.eval_shape(lambda: RewardModel(config, nnx.Rngs(0))))
    leaves, treedef = jax.tree.flatten(params)
    return graphdef, treedef, leaves


def init_params(config: ModelConfig, seed: int) -> nnx.State:
    """Freshly initialised parameters of one branch."""
    with nnx.use_eager_sharding(False):
        return jax.jit(lambda: nnx.split(RewardModel(config, nnx.Rngs(seed)))[1])()


def init_score(config: ModelConfig, seed: int) -> nnx.Variable:
    """The score head of `init_params`, without the rest: what is not returned is never allocated."""
    with nnx.use_eager_sharding(False):
        return jax.jit(lambda: nnx.split(RewardModel(config, nnx.Rngs(seed)))[1]["score"])()


def place_abstract(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Abstract parameters with the shardings they are to have on a mesh."""

    def one(variable: nnx.Variable, sharding: jax.sharding.NamedSharding) -> nnx.Variable:
        value = variable.get_value()
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    return jax.tree.map(one, params, param_shardings(params, mesh), is_leaf=lambda x: isinstance(x, nnx.Variable))


def _part(params: nnx.State, names: frozenset[str], *, inside: bool) -> nnx.State:
    """The sub-state whose first path element is (or is not) among `names`."""
    return nnx.State({k: v for k, v in params.items() if (k in names) == inside})


def branch_frozen(freeze: tuple[str, ...], view: BranchInput) -> frozenset[str]:
    """First path elements that a branch does not train: those frozen by choice, and image parts it never uses."""
    return frozenset(freeze) | (frozenset(IMAGE_PARTS) if view in TEXT_VIEWS else frozenset())


def adapted_branches(lora: LoraConfig, branches: Iterable[str]) -> list[str]:
    """The branches with adapters, in a fixed order; raises ValueError for one in `lora` that there is not."""
    known = sorted(branches)
    if unknown := sorted(set(lora.branches or ()) - set(known)):
        raise ValueError(f"lora.branches names {', '.join(unknown)}; the objective has {', '.join(known)}")
    return [b for b in known if lora.branches is None or b in lora.branches] if lora.rank else []


def split_params(
    params: nnx.State,
    views: dict[str, BranchInput],
    freeze: tuple[str, ...],
    lora: LoraConfig = LoraConfig(),
    seed: int = 0,
    frozen_dtype: str = "float32",
) -> tuple[dict[str, nnx.State], nnx.State]:
    """(trainable per branch, frozen): every branch starts from the same parameters.

    A branch with adapters trains these, drawn from `seed`, and its score head. What is frozen is kept in
    `frozen_dtype`, but for the score head. All are copies: a train step gives up the buffers of its state, and `params`
    may start another run. Raises ValueError for a name in `freeze` or `lora` that the model does not have, and where a
    branch has nothing to train.
    """
    unknown = set(freeze) - set(params)
    if unknown:
        raise ValueError(f"freeze names {sorted(unknown)}, but the model's parts are {sorted(params)}")
    check_targets(params, lora)
    adapted = adapted_branches(lora, views)
    trunk = tuple(set(params) - {"score"})
    frozen_names = {b: branch_frozen((*freeze, *trunk) if b in adapted else freeze, v) for b, v in views.items()}
    trainable = {b: jax.tree.map(jnp.array, _part(params, names, inside=False)) for b, names in frozen_names.items()}
    for i, branch in enumerate(adapted):
        used = _part(params, branch_frozen((), views[branch]), inside=False)
        adapters = init_adapters(used, lora, jax.random.fold_in(jax.random.key(seed), i))
        trainable[branch] = nnx.merge_state(trainable[branch], adapters)
    if empty := [branch for branch, part in trainable.items() if not jax.tree.leaves(part)]:
        parts = ", ".join(sorted(params))
        raise ValueError(f"freeze leaves {' and '.join(empty)} nothing to train; the model's parts are {parts}")
    frozen = _part(params, frozenset().union(*frozen_names.values()), inside=True)
    dtypes = {part: None if part == "score" else frozen_dtype for part in frozen}
    return trainable, nnx.State({k: jax.tree.map(lambda x, d=dtypes[k]: jnp.array(x, d), v) for k, v in frozen.items()})


def merge_branch(trainable: nnx.State, frozen: nnx.State) -> nnx.State:
    """All parameters of one branch: its own, and the frozen ones it does not train."""
    return nnx.merge_state(frozen, trainable)


def create_state(
    params: nnx.State,
    views: dict[str, BranchInput],
    freeze: tuple[str, ...],
    optimizer: optax.GradientTransformation,
    seed: int,
    lora: LoraConfig = LoraConfig(),
    frozen_dtype: str = "float32",
    heads: Mapping[str, int | None] = MappingProxyType({}),
    carried: tuple[float, ...] = (),
    memory: tuple[int, int] = (0, 0),
) -> TrainState:
    """The state at step 0; `heads`, `carried` and the shape of `memory` are what the objective has of its own."""
    trainable, frozen = split_params(params, views, freeze, lora, seed, frozen_dtype)
    if heads:
        trainable[HEADS] = init_heads(heads, jax.tree.leaves(params["score"])[0].shape[0], seed)
    return TrainState(
        trainable,
        frozen,
        optimizer.init(trainable),
        jnp.zeros((), jnp.int32),
        jnp.asarray(seed, jnp.int32),
        jnp.asarray(carried, jnp.float32) if carried else None,
        jnp.zeros(memory, jnp.float32) if memory[1] else None,
    )


def init_heads(heads: Mapping[str, int | None], width: int, seed: int) -> nnx.State:
    """An objective's heads [width, K], like the score head N(0, 1 / (width + 1)); None is a K of `width`."""
    rngs = nnx.Rngs(seed)
    init = nnx.initializers.normal((width + 1) ** -0.5)
    with nnx.use_eager_sharding(False):
        drawn = {name: param(rngs, (width, k or width), ("norm", "norm"), init) for name, k in heads.items()}
    return nnx.State(drawn)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a (possibly abstract) state; optimiser moments are sharded like their parameter."""
    params = {b: param_shardings(p, mesh) for b, p in state.params.items()}
    by_path = {path: s for path, s in jax.tree_util.tree_flatten_with_path(params)[0]}

    def moment(path: tuple, leaf: jax.Array) -> jax.sharding.NamedSharding:
        # A moment's path ends with its parameter's path.
        suffixes = (path[i:] for i in range(len(path)))
        found = next((by_path[s] for s in suffixes if s in by_path), None)
        return replicated(mesh) if found is None else found

    # A variable counts as a leaf, as it does in `param_shardings`: its value inside has a longer path.
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    opt_state = jax.tree_util.tree_map_with_path(moment, state.opt_state, is_leaf=is_variable)
    frozen = param_shardings(state.frozen, mesh)
    whole = replicated(mesh)
    carried, memory = (None if x is None else whole for x in (state.carried, state.memory))
    return TrainState(params, frozen, opt_state, whole, whole, carried, memory)  # type: ignore[arg-type]
