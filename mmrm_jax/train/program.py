"""One objective on one model, compiled: what the runs of an experiment share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mmrm_jax.config import BranchInput, ModelConfig, OptimizerConfig, TrainConfig
from mmrm_jax.models.layers import UNROLLED
from mmrm_jax.objectives import Objective, find_objective
from mmrm_jax.sharding import check_heads, make_mesh, on_one_cpu, put_batch, replicated
from mmrm_jax.train.optimizer import make_optimizer
from mmrm_jax.train.state import TrainState, abstract_model, create_state, state_shardings
from mmrm_jax.train.step import all_finite, make_eval_step, make_train_step
from mmrm_jax.types import Batch, PyTree

# On one CPU a deep model's step is scheduled for the least memory; a shallow one is a tenth faster with its small
# operations side by side, since each leaves cores idle.
LEAST_MEMORY = MappingProxyType({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted steps with shardings; pure but for XLA's cache of compilations, which is what is worth sharing.

    `views` says what each branch sees, `inputs` what else a batch holds a prefix of beside that.
    `abstract` is the state's shapes, dtypes and shardings; with an abstract batch, `lower_train_step(abstract, batch)`
    gives what compiling ahead of time begins with.
    """

    objective: Objective
    views: dict[str, BranchInput]
    inputs: dict[str, BranchInput]
    mesh: Mesh
    optimizer: optax.GradientTransformation
    abstract: TrainState
    shardings: TrainState
    train_step: Callable
    eval_step: Callable
    is_finite: Callable
    lower_train_step: Callable
    comparisons: int

    def init(self, params: nnx.State, config: TrainConfig) -> TrainState:
        """The sharded state at step 0 from one branch's parameters."""
        state = _new_state(params, self.objective, self.optimizer, config, self.comparisons)
        return jax.device_put(state, self.shardings)

    def put(self, batch: Batch, *, micro: bool = True) -> Batch:
        """Place a host batch on the mesh, leaving out the prefixes that this objective does not use."""
        prefixes = {name: batch.prefixes[name] for name in self.inputs}
        return put_batch(dataclasses.replace(batch, prefixes=prefixes), self.mesh, micro=micro, shared=self.shared)

    @property
    def shared(self) -> set[str]:
        """The inputs whose groups have one blank image between them."""
        return {name for name, view in self.inputs.items() if view == "blank"}


def build_program(
    model: ModelConfig, config: TrainConfig, steps: int, mesh: Mesh | None = None, *, comparisons: int = 1
) -> Program:
    """Set up the optimiser and both steps. Nothing is compiled before its first call.

    `mesh` is that of the configuration over all devices unless another is given, of devices that are not at hand say.
    `comparisons` are those of the training data, for an objective that keeps numbers of each.
    Raises ValueError for an unknown objective, and where it does not go with the rest of the configuration.
    """
    objective = find_objective(config.objective)
    if objective.couples and config.micro_batches > 1:
        raise ValueError(f"{objective.name} looks at a batch as a whole: train it with micro_batches=1")
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_heads(model, mesh)
    optimizer = make_optimizer(_optimizer_config(objective, config), steps, model.decoder.family)
    graphdef, params = abstract_model(as_trained(model, config))
    abstract = jax.eval_shape(lambda p: _new_state(p, objective, optimizer, config, comparisons), params)
    shardings = state_shardings(abstract, mesh)
    dtype = jnp.dtype(config.compute_dtype)
    train_step = make_train_step(graphdef, objective, optimizer, dtype, config.proxy_input)
    eval_step = make_eval_step(graphdef, objective, dtype)
    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=dict(LEAST_MEMORY) if on_one_cpu(mesh) and model.decoder.num_layers > UNROLLED else None,
    )
    return Program(
        objective,
        objective.views(config.proxy_input),
        objective.inputs(config.proxy_input),
        mesh,
        optimizer,
        _placed(abstract, shardings),
        shardings,
        _in_mesh(mesh, jitted),
        _in_mesh(mesh, jax.jit(eval_step)),
        _in_mesh(mesh, jax.jit(all_finite, out_shardings=replicated(mesh))),
        _in_mesh(mesh, jitted.lower),
        comparisons,
    )


def _new_state(
    params: nnx.State,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    comparisons: int,
) -> TrainState:
    views = objective.views(config.proxy_input)
    config = objective.adapt(config)
    return create_state(
        params,
        views,
        config.freeze,
        optimizer,
        config.seed,
        config.lora,
        config.frozen_dtype,
        objective.heads,
        objective.state,
        (comparisons, objective.remembers),
    )


def _optimizer_config(objective: Objective, config: TrainConfig) -> OptimizerConfig:
    """That of the run; nothing waits for a proxy that there is not."""
    return config.optimizer if "proxy" in objective.branches else dataclasses.replace(config.optimizer, head_start=0)


def as_trained(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    """The model with what a run, and not its checkpoint, says of it."""
    rate = model.vision.drop_path_rate if config.drop_path_rate is None else config.drop_path_rate
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, drop_path_rate=rate, remat=config.remat),
        decoder=dataclasses.replace(model.decoder, remat=config.remat),
    )


def _placed(abstract: TrainState, shardings: TrainState) -> TrainState:
    """Abstract arrays with their shardings; one sharding covers a variable, whose value lies inside it."""

    def place(sharding: NamedSharding, part: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

    return jax.tree.map(place, shardings, abstract)


def _in_mesh(mesh: Mesh, step: Callable) -> Callable:
    """Trace and call a step with its mesh set, so that the model can pin activations to it."""

    @functools.wraps(step)
    def call(*args):
        with jax.set_mesh(mesh):
            return step(*args)

    return call
