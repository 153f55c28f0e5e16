"""A run of `mmrm train`, or a cell of `mmrm matrix`, which is one too, read back."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mmrm_jax.config import MeshConfig, TrainConfig
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.checkpoint import CheckpointError, Checkpoints
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.train.setup import Checkpoint, model_fingerprint, open_checkpoint
from mmrm_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's settings, the checkpoint folder it started from, the data it was trained on, and how to restore it.

    `steps` is how many it was to take; `config.mesh` is a mesh of this machine's devices.
    """

    path: Path
    config: TrainConfig
    checkpoint: Checkpoint
    program: Program
    data: str
    steps: int

    def restore(self, console: Console, chosen: int | None = None) -> tuple[TrainState, int]:
        """(state without optimiser moments, step) of the last whole checkpoint, or of step `chosen`.

        Says so where the last is not the end of the run. Raises CheckpointError where there is no such checkpoint.
        """
        checkpoints = Checkpoints(self.path / "checkpoints")
        if chosen is not None:
            checkpoints.check(chosen)
        step = checkpoints.latest(lambda message: console.print(message, style="yellow")) if chosen is None else chosen
        if step is None:
            raise CheckpointError(f"{self.path / 'checkpoints'} holds no complete checkpoint: finish the run first")
        like = dataclasses.replace(self.program.abstract, opt_state=(), memory=None)
        state = checkpoints.restore(step, like, without=("opt_state", "memory"))
        checkpoints.close()
        if chosen is None and step < self.steps:
            console.print(
                f"unfinished: {self.path} stopped at step {step} of {self.steps}; the same command goes on",
                style="yellow",
            )
        return state, step


def read_run(path: Path) -> SavedRun:
    """Raises CheckpointError where `path` holds no run, or its model's folder has changed since."""
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} is not a run directory: it has no config.json")
    saved = json.loads((path / "config.json").read_text())
    if "trained_on" not in saved:
        if cells := sorted((path / "cells").glob("*/config.json")):
            raise CheckpointError(f"{path} holds a matrix of {len(cells)} runs; name one: {cells[0].parent}, say")
        raise CheckpointError(f"{path} holds no run of `mmrm train`, which names its data in config.json")
    model, data, steps = Path(saved.pop("model") or MODEL_DIR), saved.pop("trained_on"), saved.pop("total_steps")
    if model_fingerprint(model) != saved.pop("fingerprints")["model"]:
        raise CheckpointError(
            f"{model} is not what {path} was trained from: its weights, config.json, tokenizer or preprocessing have "
            "changed since; bring back the files it had"
        )
    config = _from_json(TrainConfig, {k: v for k, v in saved.items() if k != "image_root"})
    config = dataclasses.replace(config, mesh=_fitting(config.mesh))
    checkpoint = open_checkpoint(model, config.data)
    return SavedRun(path, config, checkpoint, build_program(checkpoint.config, config, 1), data, steps)


def _fitting(mesh: MeshConfig) -> MeshConfig:
    """The mesh that a run was trained on, where this machine has as many devices, else as much of its `fsdp` as they
    divide by.

    One process does not span slices.
    """
    mesh = mesh if jax.process_count() > 1 else dataclasses.replace(mesh, dcn_data=1)
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    divides = jax.device_count() % (mesh.fsdp * mesh.tensor) == 0
    if math.prod(sizes) == jax.device_count() or (mesh.data == -1 and divides):
        return mesh
    return MeshConfig(fsdp=math.gcd(jax.device_count(), mesh.fsdp))


def _from_json(cls: Any, values: dict[str, Any]) -> Any:
    """A configuration from its `to_json` values. Raises CheckpointError naming the field that it does not have."""
    types = typing.get_type_hints(cls)
    fields = {}
    for name, value in values.items():
        kind = types.get(name)
        if kind is None or dataclasses.is_dataclass(kind) != isinstance(value, dict):
            raise CheckpointError(f"config.json: {name} is {value!r:.50}, which is no setting of {cls.__name__}")
        if isinstance(value, dict):
            value = _from_json(kind, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and Path in typing.get_args(kind):
            value = Path(value)
        fields[name] = value
    return cls(**fields)
