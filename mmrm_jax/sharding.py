"""Device meshes and the one table that maps logical axis names to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmrm_jax.config import MeshConfig, ModelConfig
from mmrm_jax.types import Batch, Prefix, PyTree

MeshAxes: TypeAlias = str | tuple[str, ...] | None

# Logical axis -> mesh axes. An axis that is not named here is an error, so that none is replicated by accident.
RULES: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    # A reward model has no logits, so nothing wants the vocabulary split, which is seldom even: columns are, instead.
    "vocab": None,
    "columns": ("tensor", "fsdp"),
    "looked_up": "tensor",  # the columns again, once FSDP's part of the table has been gathered
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "layers": None,
    "vision": "fsdp",
    "vision_heads": "tensor",
    "norm": None,
}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all), laid out along the links between them.

    With `dcn_data` above 1 each part of the data axis is one slice (on platforms without slices, one process). TPUs
    have slices; elsewhere JAX calls each host one, and any axis may span hosts: InfiniBand joins them.
    Raises ValueError where the sizes do not multiply to the number of devices, or the slices are not `dcn_data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes[0] == -1:
        sizes[0] = len(devices) // (sizes[1] * sizes[2])
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} needs a product of {len(devices)} "
            f"(the number of devices), or data=-1 with fsdp*tensor dividing it"
        )
    grid = _hybrid(sizes, config.dcn_data, devices) if config.dcn_data > 1 else _within_slice(sizes, devices)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _within_slice(sizes: list[int], devices: list[Any]) -> np.ndarray:
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1 and devices[0].platform == "tpu":
        raise ValueError(f"the devices are {slices} slices, which only the data axis may span: set dcn_data={slices}")
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _hybrid(sizes: list[int], dcn_data: int, devices: list[Any]) -> np.ndarray:
    """Slices one after the other along the data axis: only it crosses the data-centre network."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    processes = len({d.process_index for d in devices})
    if sizes[0] % dcn_data or dcn_data not in (slices, processes):
        raise ValueError(
            f"mesh dcn_data={dcn_data} must divide data={sizes[0]}, and be the number of slices ({slices} here) or of "
            f"processes ({processes} here); dcn_data=1 is for devices that fast links join"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // dcn_data, *sizes[1:]),
        (dcn_data, 1, 1),
        devices,
        process_is_granule=dcn_data != slices,
        allow_split_physical_axes=True,
    )


def check_heads(model: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where the tensor axis would cut through attention heads, whose parts would have to be joined
    again in every layer. A vision tower with an odd number of heads does not split them (`VisionLayer`).
    """
    ways, vision = mesh.shape["tensor"], model.vision.num_heads
    heads = {
        "decoder.num_heads": model.decoder.num_heads,
        "decoder.num_kv_heads": model.decoder.num_kv_heads,
        "vision.num_heads": 0 if vision % 2 else vision,
    }
    bad = [f"{name} {count}" for name, count in heads.items() if count % ways]
    if bad:
        largest = math.gcd(*heads.values())
        raise ValueError(
            f"mesh tensor={ways} does not divide {' and '.join(bad)}: the model's heads allow a tensor that divides "
            f"{largest}; more devices go to fsdp or data"
        )


def partition_spec(axes: tuple[str | None, ...], rules: Mapping[str, MeshAxes] = RULES) -> P:
    """Logical axes of one array -> PartitionSpec.

    Raises KeyError for an unknown logical axis and ValueError where two axes claim the same mesh axis.
    """
    entries = [None if a is None else rules[a] for a in axes]
    used = [m for e in entries if e is not None for m in (e if isinstance(e, tuple) else (e,))]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map two dimensions to one mesh axis: {entries}")
    return P(*entries)


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """NamedShardings of a (possibly abstract) nnx.State of annotated parameters.

    Raises ValueError naming the parameter whose dimension the mesh does not divide, and sizes that would.
    """

    def one(path: tuple, variable: nnx.Variable) -> NamedSharding:
        name = "/".join(str(getattr(p, "key", p)) for p in path)
        value = variable.get_value()
        axes = variable.get_metadata().get("out_sharding")
        if axes is None or len(axes) != len(value.shape):
            raise ValueError(f"parameter {name} of shape {value.shape} has logical axes {axes}")
        spec = partition_spec(axes)
        for size, entry in zip(value.shape, spec, strict=True):
            names = [m for m in (entry if isinstance(entry, tuple) else (entry,)) if m]
            ways = math.prod(mesh.shape[m] for m in names)
            if size % ways:
                asked = " * ".join(f"{m}={mesh.shape[m]}" for m in names)
                raise ValueError(
                    f"parameter {name} {value.shape}: {size} does not divide into {ways} parts ({asked}); it does into "
                    f"{math.gcd(size, ways)}: make {' or '.join(names)} of the mesh smaller, and data larger instead"
                )
        return NamedSharding(mesh, spec)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return treedef.unflatten([one(path, leaf) for path, leaf in leaves])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_shardings(batch: Batch, mesh: Mesh, *, micro: bool, shared: Collection[str] = ()) -> PyTree:
    """Groups are split over ("data", "fsdp"); comparisons, which may join any two responses, are replicated.

    `micro` says that arrays carry a leading micro-batch axis; `shared` names the branches whose groups have one (blank)
    image between them, which is replicated. Shapes do not tell: a process may hold one group, too.
    """
    whole = replicated(mesh)
    split = NamedSharding(mesh, P(*((None,) if micro else ()), RULES["batch"]))
    shardings = jax.tree.map(lambda _: split, dataclasses.replace(batch, comparisons=None))
    prefixes = {
        branch: _with_image(prefix, whole) if branch in shared else prefix
        for branch, prefix in shardings.prefixes.items()
    }
    comparisons = jax.tree.map(lambda _: whole, batch.comparisons)
    return dataclasses.replace(shardings, prefixes=prefixes, comparisons=comparisons)


def _with_image(prefix: Prefix, sharding: Any) -> Prefix:
    """The shardings of a prefix with another for its image, in whichever form that is given."""
    pixels, features = jax.tree.map(lambda _: sharding, (prefix.pixels, prefix.features))
    return dataclasses.replace(prefix, pixels=pixels, features=features)


def whole_batch(size: int, mesh: Mesh) -> int:
    """`size` groups, rounded up to a multiple of the devices that groups are split over."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-size // ways) * ways


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which share of every batch this process reads.

    Processes that hold the same groups, since one group's computation spans them, read the same share. Raises
    ValueError where processes hold groups that overlap in part, or unequal numbers of them.
    """
    shares = _shares(mesh)
    return sorted(set(shares.values())).index(shares[jax.process_index()]), len(set(shares.values()))


def _shares(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> which of the parts that groups are split into it holds, ascending."""
    ways = whole_batch(1, mesh)
    parts: dict[int, set[int]] = {}
    for device, (part,) in NamedSharding(mesh, P(RULES["batch"])).devices_indices_map((ways,)).items():
        parts.setdefault(device.process_index, set()).update(range(*part.indices(ways)))
    shares = {process: tuple(sorted(held)) for process, held in parts.items()}
    distinct = set(shares.values())
    if sum(map(len, distinct)) != ways or len({len(share) for share in distinct}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives the processes parts of a batch that overlap or differ in size ({shares}): "
            "choose data*fsdp so that it divides, or is divided by, the number of processes"
        )
    return shares


def put_batch(batch: Batch, mesh: Mesh, *, micro: bool, shared: Collection[str] = ()) -> Batch:
    """Place a host batch on the mesh, as `batch_shardings` says; of several processes, each gives its `batch_share`.

    Raises ValueError where the groups of the whole batch cannot be split evenly.
    """
    processes = 1 if jax.process_count() == 1 else batch_share(mesh)[1]
    groups, ways = batch.group_index.shape[-1] * processes, whole_batch(1, mesh)
    if groups % ways:
        part = "micro-batch" if micro else "batch"
        raise ValueError(
            f"a {part} has {groups} groups, which mesh data={mesh.shape['data']} * fsdp={mesh.shape['fsdp']} does not "
            f"divide: choose batch_size (and eval_batch_size) so that every {part} has a multiple of {ways}"
        )
    shardings = batch_shardings(batch, mesh, micro=micro, shared=shared)
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    # A process knows the comparisons of its own groups alone: they are put together like groups, then given to all.
    split = NamedSharding(mesh, P(*((None,) if micro else ()), RULES["batch"]))
    local = dataclasses.replace(batch.comparisons, index=_global_responses(batch, mesh))
    comparisons = jax.device_put(jax.make_array_from_process_local_data(split, local), replicated(mesh))
    rest = dataclasses.replace(batch, comparisons=None)
    placed = jax.make_array_from_process_local_data(dataclasses.replace(shardings, comparisons=None), rest)
    return dataclasses.replace(placed, comparisons=comparisons)


def _global_responses(batch: Batch, mesh: Mesh) -> np.ndarray:
    """`comparisons.index` of this process's groups as indices into the responses of the whole batch."""
    groups, responses = batch.responses.last.shape[-2:]
    parts = np.asarray(_shares(mesh)[jax.process_index()])
    size = groups // len(parts)
    local, response = np.divmod(np.asarray(batch.comparisons.index), responses)
    return ((parts[local // size] * size + local % size) * responses + response).astype(np.int32)


def gather(tree: PyTree, mesh: Mesh) -> PyTree:
    """The values of arrays on the mesh, whole, as numpy arrays in every process."""
    return jax.device_get(jax.device_put(tree, replicated(mesh)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's logical axes inside a computation; without a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def by_group(x: jax.Array, last: str | None = None) -> jax.Array:
    """Pin an activation's first axis to the devices of its groups and its last as `last` says; all others are whole.

    FSDP then gathers parameters and never activations, whatever their sizes. What all groups share (a blank tile)
    lies whole on every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return constrain(x, _groups_axis(x.shape[0]), *(None,) * (x.ndim - 2), last)


def on_each_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Call a kernel that XLA cannot split with what each device has of its groups and heads.

    Groups are the first axis of all arrays and of the result, which is shaped as the first array; heads the last but
    one, where there are four axes or more. What all groups share, and heads that the mesh does not divide (those of a
    vision tower that does not split them), every device computes whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1:
        return kernel(*arrays)
    groups = _groups_axis(arrays[0].shape[0])
    divided = all(x.shape[-2] % mesh.shape["tensor"] == 0 for x in arrays if x.ndim >= 4)
    heads = "heads" if divided else None

    def spec(x: jax.Array) -> P:
        return partition_spec((groups, *(None,) * (x.ndim - 3), heads, None) if x.ndim >= 4 else (groups,))

    in_specs = tuple(spec(x) for x in arrays)
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=spec(arrays[0]), check_vma=False)(*arrays)


def _groups_axis(size: int) -> str | None:
    """The logical axis of `size` groups, or of what they share: a number of them that the mesh does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if size % (mesh.shape["data"] * mesh.shape["fsdp"]) else "batch"


def on_one_cpu(mesh: Mesh | None = None) -> bool:
    """Whether a mesh, or that of the step that is being traced, is one CPU device."""
    of = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    device = of.abstract_device
    return of.size <= 1 and (jax.default_backend() if device is None else device.platform) == "cpu"
