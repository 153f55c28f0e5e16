"""Reading and writing safetensors checkpoints with the name table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmrm_jax.config import ModelConfig
from mmrm_jax.models.hf.names import Entry, from_hf, hf_shape, name_table, to_hf

# Tensors a checkpoint may hold that a reward model has no use for.
UNUSED = frozenset({"language_model.lm_head.weight"})


def _values(params: nnx.State) -> dict[tuple[str, ...], nnx.Variable]:
    return {tuple(str(p) for p in path): v for path, v in nnx.to_flat_state(params)}


def _layers(entry: Entry, shape: tuple[int, ...]) -> Iterable[tuple[int | None, str, tuple[int, ...]]]:
    """(layer or None, tensor name, unstacked shape) of every tensor an entry stands for."""
    if "{}" not in entry.name:
        return [(None, entry.name, shape)]
    return [(i, entry.name.format(i), shape[1:]) for i in range(shape[0])]


def load_params(path: Path, config: ModelConfig, init: nnx.State) -> tuple[nnx.State, list[str]]:
    """Parameters of a checkpoint folder's `model.safetensors`, in float32.

    `init` gives the structure, and the values of `score` where the checkpoint has no `score.weight`; the second
    result names what was so initialised. Raises ValueError listing missing, unknown and mis-shaped tensors.
    """
    file = path / "model.safetensors"
    values = _values(init)
    plan = [(e, *t) for e in name_table(config) for t in _layers(e, values[e.path].get_value().shape)]
    try:
        with safe_open(file, framework="numpy") as f:
            present = set(f.keys())
            problems = _problems(f, plan, present, config)
            if problems:
                raise ValueError(f"{file} does not fit its config.json:\n  " + "\n  ".join(problems))
            read = {name: f.get_tensor(name).astype(np.float32) for _, _, name, _ in plan if name in present}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    arrays: dict[tuple[str, ...], list[np.ndarray]] = {}
    for entry, _, name, shape in plan:
        if name in read:
            arrays.setdefault(entry.path, []).append(from_hf(read[name], entry.layout, shape))
    stacked = {e.path: "{}" in e.name for e in name_table(config)}

    def fill(at: tuple, variable: nnx.Variable) -> nnx.Variable:
        key = tuple(str(p.key) for p in at if isinstance(p, jax.tree_util.DictKey))
        if key not in arrays:
            return variable
        return variable.replace(jnp.asarray(np.stack(arrays[key]) if stacked[key] else arrays[key][0]))

    filled = jax.tree_util.tree_map_with_path(fill, init, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return filled, [".".join(k) for k in values if k not in arrays]


def _problems(f, plan: list, present: set[str], config: ModelConfig) -> list[str]:
    expected = {name: hf_shape(shape, entry, config) for entry, _, name, shape in plan}
    missing = sorted(expected.keys() - present - {"score.weight"})
    unknown = sorted(present - expected.keys() - UNUSED)
    shapes = {n: tuple(f.get_slice(n).get_shape()) for n in sorted(expected.keys() & present)}
    wrong = [f"{n} is {s}, config.json says {expected[n]}" for n, s in shapes.items() if s != expected[n]]
    return [f"missing: {n}" for n in missing] + [f"unknown: {n}" for n in unknown] + [f"shape: {w}" for w in wrong]


def save_params(path: Path, config: ModelConfig, params: nnx.State) -> None:
    """Write `model.safetensors`, float32, in a fixed order; the inverse of `load_params`."""
    values = _values(params)
    tensors = {}
    for entry in name_table(config):
        if entry.path not in values:
            continue
        whole = np.asarray(values[entry.path].get_value(), np.float32)
        for layer, name, shape in _layers(entry, whole.shape):
            ours = whole if layer is None else whole[layer]
            tensors[name] = np.ascontiguousarray(to_hf(ours, entry.layout, hf_shape(shape, entry, config)))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
