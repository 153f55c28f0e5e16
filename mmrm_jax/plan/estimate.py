"""Memory and communication of a train step by analysis: what ranks candidates, and all there is for GPUs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from mmrm_jax.config import TEXT_VIEWS, ModelConfig, TrainConfig
from mmrm_jax.plan.hlo import Collective
from mmrm_jax.plan.shapes import DataShape, abstract_batch
from mmrm_jax.train.program import Program, as_trained
from mmrm_jax.train.state import IMAGE_PARTS, abstract_model
from mmrm_jax.train.step import branch_rewards
from mmrm_jax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the step's peak.

    `parameters`, `optimizer`, `frozen` and `batch` are the step's arguments. `temporaries` is all the step allocates:
    activations kept for the backward pass, gradients, weights in the compute dtype, collectives' buffers. `code` is the
    program itself, which only compiling tells.
    """

    parameters: float
    optimizer: float
    frozen: float
    batch: float
    temporaries: float
    code: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes that the forward pass of one group keeps for the backward pass, as JAX traces it.

    `whole` is of arrays as wide as the model, which every device of the tensor axis holds; it divides `split`.
    """

    whole: float
    split: float


def saved_activations(program: Program, model: ModelConfig, config: TrainConfig, shape: DataShape) -> Saved:
    """Traced for one group and for two: the difference is what grows with the batch. Nothing is allocated.

    The program's mesh decides on the kernels.
    """
    graphdef, _ = abstract_model(as_trained(model, config))
    views, dtype = program.views, jnp.dtype(config.compute_dtype)

    def pullback(params: dict[str, nnx.State], frozen: nnx.State, batch: Batch) -> PyTree:
        def total(params: dict[str, nnx.State]) -> jax.Array:
            return sum(
                (jnp.sum(r) for r in branch_rewards(graphdef, params, frozen, batch, dtype).values()), jnp.zeros(())
            )

        return jax.vjp(total, params)[1]

    def residuals(groups: int) -> list[jax.ShapeDtypeStruct]:
        batch = abstract_batch(shape, model, views, groups=groups, micro_batches=None, features=config.features_dtype)
        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
            return jax.tree.leaves(jax.eval_shape(pullback, program.abstract.params, program.abstract.frozen, batch))

    widths = {model.decoder.width, model.vision.width}
    whole = split = 0.0
    for one, two in zip(residuals(1), residuals(2), strict=True):
        more = (two.size - one.size) * two.dtype.itemsize
        if two.shape and two.shape[-1] in widths:
            whole += more
        else:
            split += more
    return Saved(whole, split)


def device_bytes(tree: PyTree) -> float:
    """What one device holds of abstract arrays with shardings."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def cast_bytes(tree: PyTree, dtype: str) -> float:
    """What one device holds of a copy in `dtype` of those arrays that are not of it."""
    others = [x for x in jax.tree.leaves(tree) if x.dtype != jnp.dtype(dtype)]
    return sum(device_bytes(x) / x.dtype.itemsize for x in others) * jnp.dtype(dtype).itemsize


def estimate_memory(
    program: Program,
    batch: Batch,
    model: ModelConfig,
    config: TrainConfig,
    shape: DataShape,
    saved: Saved,
    flash: bool = False,
) -> Memory:
    """The state exactly, by its shardings; temporaries by analysis.

    These are: what the forward pass keeps of one micro-batch, gradients (and their sum over micro-batches), weights in
    the compute dtype, the gathered embedding and its gradient, two gathered layers, and, unless `flash` says that they
    are not kept, three float32 copies of the largest attention scores, which is what the backward pass of one layer
    holds at once.
    """
    state, sizes = program.abstract, program.mesh.shape
    parameters, frozen = device_bytes(state.params), device_bytes(state.frozen)
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    d, tensor = model.decoder, sizes["tensor"]
    groups = config.batch_size / config.micro_batches / (sizes["data"] * sizes["fsdp"])
    gradients = parameters * (2 if config.micro_batches > 1 else 1)
    casts = sum(cast_bytes(tree, config.compute_dtype) for tree in (state.params, state.frozen))
    layer = (2 * d.width * (d.num_heads + d.num_kv_heads) * d.head_width + 3 * d.width * d.mlp_width) / tensor
    gathered = 0.0 if sizes["fsdp"] == 1 else (2 * layer + 2 * d.vocab_size * d.width / tensor) * itemsize
    prefix = max(shape.prefix_of(view, model) for view in program.views.values())
    scores = max(prefix**2, shape.responses * shape.response * (prefix + shape.response))
    attention = 0.0 if flash else 3 * 4.0 * scores * d.num_heads / tensor * groups
    kept = (saved.whole + saved.split / tensor) * groups
    temporaries = kept + gradients + casts + gathered + attention
    return Memory(parameters, device_bytes(state.opt_state), frozen, device_bytes(batch), temporaries)


def estimate_collectives(
    program: Program, model: ModelConfig, config: TrainConfig, shape: DataShape
) -> list[Collective]:
    """What fully sharded, tensor-parallel and data-parallel training need at least, in each micro-batch.

    fsdp: parameters in the compute dtype gathered for the forward and again for the backward pass, gradients scattered;
    data: gradients all-reduced; tensor: all-reduces of a layer's activations, two forward, backward one for each matrix
    whose input is whole (q, k, v, gate, up), and one more where the layer is computed again; of a frozen tower the two
    forward. Gradients of the decoder come twice, from the prefix and from the responses: the compiler sums each over
    devices before it adds them.
    """
    sizes, micro = program.mesh.shape, config.micro_batches
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    fsdp, tensor, data = sizes["fsdp"], sizes["tensor"], sizes["data"]
    trained = program.abstract.params
    found = []
    twice = sum(_elements(branch.get("decoder", {})) for branch in trained.values())
    if fsdp > 1:
        found.append(Collective("all-gather", _elements(trained) * fsdp * itemsize, fsdp, 2 * micro))
        found.append(Collective("reduce-scatter", (_elements(trained) + twice) * itemsize, fsdp, micro))
        for elements, passes in _frozen_uses(program, config):
            found.append(Collective("all-gather", elements * fsdp * itemsize, fsdp, passes * micro))
    if data > 1:
        found.append(Collective("all-reduce", (_elements(trained) + twice) * itemsize, data, micro))
    if tensor > 1:
        each, again = config.batch_size / micro / (data * fsdp) * itemsize, config.remat == "full"
        tokens = sum(shape.tokens(v, model) for v in program.views.values())
        runs = (7 + again) * micro * model.decoder.num_layers
        found.append(Collective("all-reduce", tokens * each * model.decoder.width, tensor, runs))
        seen = sum(shape.tiles_of(v) for v in program.views.values() if v in ("multimodal", "image_only"))
        if seen and not config.features_dtype:
            patches = 1 + (model.vision.image_size // model.vision.patch_size) ** 2
            runs = (2 if "vision" in config.freeze else 6 + again) * micro * model.vision.num_layers
            found.append(Collective("all-reduce", seen * patches * each * model.vision.width, tensor, runs))
    return found


def _elements(tree: PyTree) -> float:
    """Elements that one device holds of abstract arrays with shardings."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)))


def _frozen_uses(program: Program, config: TrainConfig) -> Iterator[tuple[float, int]]:
    """For each branch and part that it does not train: elements on one device, and passes through it.

    The backward pass goes through what lies behind something that is trained.
    """
    unused = {"vision"} if config.features_dtype else set()
    everything = [(path, x) for path, x in nnx.to_flat_state(program.abstract.frozen) if path[0] not in unused]
    for branch, view in program.views.items():
        own, below = dict(nnx.to_flat_state(program.abstract.params[branch])), False
        for part in ("decoder", "score") if view in TEXT_VIEWS else (*IMAGE_PARTS, "decoder", "score"):
            below = below or any(path[0] == part for path in own)
            frozen = [x for path, x in everything if path[0] == part and path not in own]
            if frozen:
                yield _elements(frozen), 1 + below
