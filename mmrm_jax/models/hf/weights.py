"""Reading and writing safetensors checkpoints with the name table."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mmrm_jax.config import ModelConfig
from mmrm_jax.models.hf.names import (
    PROXY_PREFIX,
    UNUSED,
    Branch,
    CheckpointLayout,
    Entry,
    canonical_name,
    checkpoint_layout,
    name_table,
)
from mmrm_jax.models.hf.tensors import INDEX, SINGLE, VALUE_HEAD, Tensor, open_tensors, weight_files

FLOATS = ("F32", "F16", "BF16")

# How many problems of a checkpoint are listed: one that does not fit at all has thousands.
MAX_PROBLEMS = 50

Index = tuple[slice, ...]


def _values(params: nnx.State) -> dict[tuple[str, ...], nnx.Variable]:
    return {tuple(str(p) for p in path): v for path, v in nnx.to_flat_state(params)}


def _layers(entry: Entry, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """(tensor name, shape of our part of it) of every layer's tensor, or of the one there is."""
    if "{}" not in entry.name:
        return [(entry.name, shape)]
    return [(entry.name.format(i), shape[1:]) for i in range(shape[0])]


def load_params(
    path: Path, config: ModelConfig, like: nnx.State, *, branch: Branch = "primary"
) -> tuple[nnx.State, list[str]]:
    """Parameters from a checkpoint folder in either layout, of one file or several; and which of them it lacks.

    `like` has the parameters' structure, shapes and dtypes: arrays or ShapeDtypeStructs. Those with a sharding (an
    array that is committed to its devices has one) are read onto it, each device's part on its own, straight from the
    slices of the files that it needs. `score` may be missing from the checkpoint where `like` has a value for it,
    which is kept. `branch` "proxy" reads the proxy of a checkpoint that was saved with it.

    Raises ValueError listing missing, unknown, repeated, mis-shaped and mis-typed tensors, and for unreadable files.
    """
    tensors, table, kept, problems = _compared(path, config, like, branch)
    if problems:
        raise ValueError(f"{weight_files(path)[0]} does not fit its config.json:\n  " + "\n  ".join(problems))

    def fill(at: tuple, variable: nnx.Variable) -> nnx.Variable:
        key = tuple(str(p.key) for p in at if isinstance(p, jax.tree_util.DictKey))
        return variable if key in kept else variable.replace(_read_array(table[key], variable, tensors))

    filled = jax.tree_util.tree_map_with_path(fill, like, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return filled, [".".join(k) for k in kept]


def checkpoint_problems(path: Path, config: ModelConfig, like: nnx.State, *, branch: Branch = "primary") -> list[str]:
    """What keeps `load_params` from reading a checkpoint: missing, unknown, repeated, mis-shaped and mis-typed tensors.

    Of many problems the first `MAX_PROBLEMS` are listed, and the number of the others. Raises ValueError for unreadable
    files.
    """
    return _compared(path, config, like, branch)[-1]


def weights_digest(path: Path, config: ModelConfig, part: str) -> str:
    """SHA-256 of the tensors of one part of a checkpoint ("vision"), by name, dtype and shape, as its files have them.

    Raises ValueError for unreadable files.
    """
    found = _of_branch(open_tensors(path), "primary")
    layout = checkpoint_layout(found)
    tensors = {canonical_name(name, layout): t for name, t in found.items()}
    entries = [entry for entry in name_table(config, layout) if entry.path[0] == part]
    layers = {"vision": config.vision.num_layers, "decoder": config.decoder.num_layers}.get(part, 1)
    names = {entry.name.format(i) for entry in entries for i in range(layers)}
    digest = hashlib.sha256()
    for name in sorted(names & tensors.keys()):
        t = tensors[name]
        digest.update(f"\n{name} {t.dtype} {t.shape}\n".encode())
        digest.update(t.read((slice(None),) * len(t.shape)).tobytes())
    return digest.hexdigest()


def _compared(
    path: Path, config: ModelConfig, like: nnx.State, branch: Branch
) -> tuple[dict[str, Tensor], dict[tuple, Entry], list[tuple], list[str]]:
    """(tensors by their names in the table, the table by path, paths whose value in `like` is kept, problems)."""
    found = _of_branch(open_tensors(path), branch)
    layout = checkpoint_layout(found)
    tensors = {canonical_name(name, layout): t for name, t in found.items()}
    values = _values(like)
    table = {entry.path: entry for entry in name_table(config, layout)}
    kept = [p for p in values if p == ("score",) and table[p].name not in tensors and _is_concrete(values[p])]
    wanted = {p: table[p] for p in values if p not in kept}
    problems = _repeated(found, layout) + _problems(tensors, wanted, values, list(table.values()), config)
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more"]
    return tensors, table, kept, problems


def _repeated(names: Iterable[str], layout: CheckpointLayout) -> list[str]:
    """Tensors under more than one name, of which only one would be read."""
    by_own: dict[str, list[str]] = {}
    for name in sorted(names):
        by_own.setdefault(canonical_name(name, layout), []).append(name)
    return [f"repeated: {' and '.join(same)} name one parameter" for same in by_own.values() if len(same) > 1]


def _is_concrete(variable: nnx.Variable) -> bool:
    return isinstance(variable.get_value(), jax.Array)


def _of_branch(tensors: dict[str, Tensor], branch: Branch) -> dict[str, Tensor]:
    if branch == "primary":
        return {name: t for name, t in tensors.items() if not name.startswith(PROXY_PREFIX)}
    return {n.removeprefix(PROXY_PREFIX): t for n, t in tensors.items() if n.startswith(PROXY_PREFIX)}


def _problems(
    tensors: dict[str, Tensor], wanted: dict[tuple, Entry], values: dict, table: list[Entry], config: ModelConfig
) -> list[str]:
    expected = {}
    for path, entry in wanted.items():
        for name, shape in _layers(entry, values[path].get_value().shape):
            expected[name] = checkpoint_shape(shape, entry, config)
    # What the table has and `like` leaves out (an image part of a branch without one) is known all the same.
    stacks = {"vision": config.vision.num_layers, "decoder": config.decoder.num_layers}
    known = {e.name.format(i) for e in table for i in range(stacks[e.path[0]] if "{}" in e.name else 1)} | UNUSED
    problems = [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unknown: {name}" for name in sorted(tensors.keys() - known)]
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name]:
            problems.append(f"shape: {name} is {tensors[name].shape}, config.json says {expected[name]}")
        if tensors[name].dtype not in FLOATS:
            problems.append(f"dtype: {name} is {tensors[name].dtype}; supported: {', '.join(FLOATS)}")
    return problems


def checkpoint_shape(shape: tuple[int, ...], entry: Entry, config: ModelConfig) -> tuple[int, ...]:
    """The shape of the whole tensor in the checkpoint, from that of our (unstacked) part."""
    if entry.layout == "patches":
        return (shape[1], 3, config.vision.patch_size, config.vision.patch_size)
    if entry.layout == "lead1":
        return (*(1,) * (2 if entry.path[-1] == "class_embedding" else 1), *shape)
    whole = shape[::-1] if entry.layout == "linear" else shape
    return whole if entry.rows is None else (entry.rows.total, *whole[1:])


def _read_array(entry: Entry, variable: nnx.Variable, tensors: dict[str, Tensor]) -> jax.Array:
    value = variable.get_value()
    parts = [tensors[name] for name, _ in _layers(entry, value.shape)]

    def read(index: Index) -> np.ndarray:
        """A part of the parameter, filled layer by layer."""
        bounds = [range(*s.indices(n)) for s, n in zip(index, value.shape, strict=True)]
        out = _aligned(tuple(map(len, bounds)), value.dtype)
        layers = [(out, parts[0], bounds)]
        if "{}" in entry.name:
            layers = [(out[j], parts[i], bounds[1:]) for j, i in enumerate(bounds[0])]
        for target, tensor, inner in layers:
            target[...] = _read_part(tensor, entry, tuple(slice(r.start, r.stop) for r in inner))
        return out

    sharding = getattr(value, "sharding", None) if getattr(value, "committed", True) else None
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(value.shape)))
    shards, last = [], None
    # Part by part, so that the host holds one at a time; devices that hold the same part share the read.
    for device, index in sorted(sharding.addressable_devices_indices_map(value.shape).items(), key=_by_part):
        if last is None or last[0] != index:
            last = (index, read(index))
        shards.append(jax.block_until_ready(jax.device_put(last[1], device)))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)


def _by_part(item: tuple[Any, Index]) -> tuple[int, ...]:
    device, index = item
    return *((s.start or 0) for s in index), device.id


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX's CPU devices take over without a copy: they want 64-byte boundaries."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_part(tensor: Tensor, entry: Entry, index: Index) -> np.ndarray:
    """A part of our (unstacked) parameter, in its layout, from one checkpoint tensor."""
    if entry.layout == "patches":
        rows = tensor.read((index[1], slice(None), slice(None), slice(None)))
        return rows.reshape(len(rows), -1).T[index[0]]
    if entry.layout == "lead1":
        whole = tensor.read((slice(None),) * (len(tensor.shape) - len(index)) + index)
        return whole.reshape(whole.shape[len(whole.shape) - len(index) :])
    transposed = index[::-1] if entry.layout == "linear" else index
    if entry.rows is None:
        found = tensor.read(transposed)
    else:
        pieces = [tensor.read((s, *transposed[1:])) for s in _packed_rows(entry, transposed[0])]
        found = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return found.T if entry.layout == "linear" else found


def _packed_rows(entry: Entry, ours: slice) -> Iterator[slice]:
    """Where a range of our rows lies in a packed tensor."""
    rows = entry.rows
    assert rows is not None
    for i in range(ours.start // rows.block, -(-ours.stop // rows.block)):
        first, last = max(ours.start - i * rows.block, 0), min(ours.stop - i * rows.block, rows.block)
        yield slice(i * rows.stride + rows.start + first, i * rows.stride + rows.start + last)


def save_params(
    path: Path,
    config: ModelConfig,
    params: nnx.State,
    *,
    proxy: nnx.State | None = None,
    unused: Mapping[str, Tensor] = MappingProxyType({}),
    layout: CheckpointLayout = "chat",
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint, in a fixed order: the inverse of `load_params`.

    It is `model.safetensors`, or several files with an index where that would be larger than `max_file_bytes`. Parts
    of the model that `params` lacks are left out. With a `proxy` its tensors are written too, under `PROXY_PREFIX`.
    `unused` tensors of the checkpoint that training began with (`unused_tensors`) are carried over. All parameters must
    be addressable from this process.
    """
    plan: list[Planned] = list(_plan(config, params, layout, ""))
    if proxy is not None:
        plan += _plan(config, proxy, layout, PROXY_PREFIX)
    plan += [(name, tensor.shape, tensor) for name, tensor in sorted(unused.items())]
    size = 2 if dtype == "bfloat16" else 4
    files: list[list[Planned]] = [[]]
    room = max_file_bytes
    for item in plan:
        needed = size * int(np.prod(item[1]))
        if files[-1] and needed > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(item)
        room -= needed
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, items in zip(names, files, strict=True):
        made = {key: _whole(shape, source, dtype) for key, shape, source in items}
        _save(made, path / name)
    # What an earlier save left would be taken for this one.
    for name in (SINGLE if len(files) > 1 else INDEX, VALUE_HEAD):
        (path / name).unlink(missing_ok=True)
    if len(files) > 1:
        total = size * sum(int(np.prod(shape)) for _, shape, _ in plan)
        where = {key: name for name, items in zip(names, files, strict=True) for key, _, _ in items}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    """`save_file` alone makes a file that no other user may read, whatever the umask says."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def unused_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder that a reward model has no use for, by name: the LM head."""
    tensors = _of_branch(open_tensors(path), "primary")
    layout = checkpoint_layout(tensors)
    named = {canonical_name(name, layout): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name in UNUSED}


Part = tuple[Entry, jax.Array, int | None]  # of a packed tensor: whose rows, and the layer
Planned = tuple[str, tuple[int, ...], list[Part] | Tensor]  # name, shape, where it comes from


def _plan(config: ModelConfig, params: nnx.State, layout: CheckpointLayout, prefix: str) -> Iterator[Planned]:
    """Every tensor to write of one branch."""
    values = _values(params)
    by_name: dict[str, list[Entry]] = {}
    for entry in name_table(config, layout):
        if entry.path in values:
            by_name.setdefault(entry.name, []).append(entry)
    for entries in by_name.values():
        arrays = [values[e.path].get_value() for e in entries]
        for i, (name, shape) in enumerate(_layers(entries[0], arrays[0].shape)):
            layer = i if "{}" in entries[0].name else None
            parts = [(e, a, layer) for e, a in zip(entries, arrays, strict=True)]
            yield prefix + name, checkpoint_shape(shape, entries[0], config), parts


def _whole(shape: tuple[int, ...], source: list[Part] | Tensor, dtype: str) -> np.ndarray:
    """One checkpoint tensor from our parameters, or from another checkpoint."""
    if isinstance(source, Tensor):
        return source.read((slice(None),) * len(shape)).astype(jnp.dtype(dtype))
    out = np.empty(shape, jnp.dtype(dtype))
    for entry, array, layer in source:
        ours = np.asarray(array if layer is None else array[layer])
        ours = ours.T if entry.layout in ("linear", "patches") else ours
        if entry.rows is None:
            out[...] = ours.reshape(shape)
        else:
            rows = entry.rows
            groups = out.reshape(-1, rows.stride, *shape[1:])
            groups[:, rows.start : rows.start + rows.block] = ours.reshape(-1, rows.block, *shape[1:])
    return out
