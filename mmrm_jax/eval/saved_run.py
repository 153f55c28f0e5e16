"""A finished run of `mmrm train`, read back."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import jax

from mmrm_jax.config import TrainConfig
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.checkpoint import CheckpointError, Checkpoints
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.train.setup import Checkpoint, open_checkpoint
from mmrm_jax.train.state import TrainState, abstract_model


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's settings, the checkpoint folder it started from, the data it was trained on, and how to restore it."""

    path: Path
    config: TrainConfig
    checkpoint: Checkpoint
    program: Program
    data: str

    def restore(self) -> tuple[TrainState, int]:
        """(state, step) of the last complete checkpoint. Raises CheckpointError where there is none."""
        program, config = self.program, self.config
        like = jax.eval_shape(lambda p: program.init(p, config), abstract_model(self.checkpoint.config)[1])
        # One sharding covers a variable, whose value lies inside it: the shardings are a prefix of the state.
        like = jax.tree.map(
            lambda s, part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part),
            program.shardings,
            like,
        )
        checkpoints = Checkpoints(self.path / "checkpoints")
        step = checkpoints.latest()
        if step is None:
            raise CheckpointError(f"{self.path / 'checkpoints'} holds no complete checkpoint: finish the run first")
        state = checkpoints.restore(step, like)
        checkpoints.close()
        return state, step


def read_run(path: Path) -> SavedRun:
    """Raises CheckpointError where `path` holds no run of `mmrm train`."""
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} is not a run directory: it has no config.json")
    saved = json.loads((path / "config.json").read_text())
    if "trained_on" not in saved:
        raise CheckpointError(f"{path} holds no run of `mmrm train`, which names its data in config.json")
    model, data = Path(saved.pop("model") or MODEL_DIR), saved.pop("trained_on")
    saved = {k: v for k, v in saved.items() if k not in ("image_root", "fingerprints")}  # of the training data
    config = _from_json(TrainConfig, saved)
    checkpoint = open_checkpoint(model, config.data)
    return SavedRun(path, config, checkpoint, build_program(checkpoint.config, config, 1), data)


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
        fields[name] = value
    return cls(**fields)
