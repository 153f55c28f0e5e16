"""Safetensors checkpoints of one file or of several with an index: what is in them, read slice by slice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# A score head trained elsewhere (TRL's value head) may lie beside the weights, in a file and under a name of its own.
VALUE_HEAD = "value_head.safetensors"
HEAD_WEIGHT, HEAD_BIAS = "v_head.summary.weight", "v_head.summary.bias"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `dtype` is as safetensors calls it: F32, BF16, ..."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """These slices, one for each axis, and no other bytes; raises ValueError where the file cannot be read.

        The file is opened for each read, so that no mapped pages are held on to.
        """
        try:
            with safe_open(self.file, framework="numpy") as f:
                return f.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.file} cannot be read: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the index and, in order of their names, the files it names; then a value head's, if any.

    Raises ValueError where there is neither, and for an index that is damaged or names files outside the folder.
    """
    head = [folder / VALUE_HEAD] if (folder / VALUE_HEAD).is_file() else []
    if (folder / SINGLE).is_file():
        return [folder / SINGLE, *head]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    return [folder / INDEX, *(folder / name for name in sorted(set(_weight_map(folder / INDEX).values()))), *head]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name; only headers are read. A value head's weight is "score.weight".

    Its bias is left out: it adds the same number to every reward. Raises ValueError for files that are missing, cut
    short or no safetensors, where index and files disagree, and for a value head beside a score head.
    """
    files = weight_files(folder)
    head = _value_head(files.pop()) if files[-1].name == VALUE_HEAD else {}
    found = _read_header(files[0]) if files[0].name == SINGLE else _indexed(files)
    if both := found.keys() & head.keys():
        raise ValueError(f"{folder} has {', '.join(both)} and a value head in {VALUE_HEAD}: take one of them away")
    return found | head


def value_head_bias(folder: Path) -> float | None:
    """The bias of a value head in a file of its own, which rewards here leave out; None where there is none."""
    file = folder / VALUE_HEAD
    bias = _read_header(file).get(HEAD_BIAS) if file.is_file() else None
    return None if bias is None else float(bias.read((slice(None),) * len(bias.shape)).reshape(-1)[0])


def _value_head(file: Path) -> dict[str, Tensor]:
    tensors = _read_header(file)
    if HEAD_WEIGHT not in tensors or not tensors.keys() <= {HEAD_WEIGHT, HEAD_BIAS}:
        raise ValueError(
            f"{file} has {', '.join(sorted(tensors)) or 'no tensor'}; supported: {HEAD_WEIGHT}, {HEAD_BIAS}"
        )
    return {"score.weight": tensors[HEAD_WEIGHT]}


def _indexed(files: list[Path]) -> dict[str, Tensor]:
    problems, found, where = [], {}, _weight_map(files[0])
    for file in files[1:]:
        if not file.is_file():
            raise ValueError(f"{files[0]} names {file.name}, which does not exist")
        for name, tensor in _read_header(file).items():
            if where.get(name) == file.name:
                found[name] = tensor
            else:
                problems.append(f"{name} is in {file.name}, but the index has {where.get(name, 'no entry for it')}")
    problems += [f"{name} is not in {where[name]}" for name in where if name not in found]
    if problems:
        raise ValueError(f"{files[0]} does not fit its files:\n  " + "\n  ".join(sorted(problems)))
    return found


def _read_header(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="numpy") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - no mapping
            return {n: Tensor(file, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    for file in names.values():
        # A file elsewhere, or one that no file system can hold, is either an attack or a mistake.
        elsewhere = "\\" in file or PurePosixPath(file).name != file or not file.endswith(".safetensors")
        if elsewhere or not file.isprintable() or len(file.encode()) > 255:
            raise ValueError(f"{index} names the file {file!r}: only .safetensors files in its own folder are read")
    return names
