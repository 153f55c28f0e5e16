"""Orbax checkpoints of the train state.

The state is saved as a flat mapping of parameter paths to arrays, so every array's name, shape and dtype is checked
on the way back. The position in the data needs no file of its own: it is the step (see `data.pipeline.BatchPlan`).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mmrm_jax.config import differences
from mmrm_jax.types import PyTree


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit the run; the message says how."""


def _flat(tree: PyTree) -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}, treedef


class Checkpoints:
    """The checkpoints of one run directory. Saving is asynchronous; `close` waits for it."""

    def __init__(self, directory: Path, *, keep: int = 2):
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.resolve()),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # type: ignore[arg-type]
        )
        self.directory = directory

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        found = self._checkpointer.latest
        return None if found is None else int(found.step)

    def save(self, step: int, state: PyTree) -> None:
        """Start saving `state` as `step`; waits only for a save that is still under way."""
        # Unless forced, Orbax leaves out a checkpoint, even the last, while it is busy with the one before.
        self._checkpointer.save_checkpointables_async(step, {"state": _flat(state)[0]}, force=True)

    def discard_after(self, step: int) -> None:
        """Delete checkpoints newer than `step`: those of a run that starts again from there."""
        for found in self._checkpointer.checkpoints:
            if found.step > step:
                self._checkpointer.delete(found.step)

    def restore(self, step: int, like: PyTree, *, without: str | None = None) -> PyTree:
        """The state saved at `step`, placed and shaped as `like` (arrays or ShapeDtypeStructs with shardings).

        The part called `without`, which `like` then lacks too, is not read. Raises CheckpointError listing arrays that
        are missing, superfluous or of another shape or dtype.
        """
        wanted, treedef = _flat(like)
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in wanted.items()}
        saved = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        saved = {k: v for k, v in saved.items() if without is None or k.partition("/")[0] != without}
        problems = [f"missing: {k}" for k in sorted(wanted.keys() - saved.keys())]
        problems += [f"superfluous: {k}" for k in sorted(saved.keys() - wanted.keys())]
        for k in sorted(wanted.keys() & saved.keys()):
            if tuple(saved[k].shape) != tuple(wanted[k].shape):
                problems.append(f"shape of {k}: saved {tuple(saved[k].shape)}, wanted {tuple(wanted[k].shape)}")
            if saved[k].dtype != wanted[k].dtype:
                problems.append(f"dtype of {k}: saved {saved[k].dtype}, wanted {wanted[k].dtype}")
        if problems:
            raise CheckpointError(f"{self.directory}, step {step}, does not fit:\n  " + "\n  ".join(problems))
        context = ocp.Context()
        context.pytree.loading.partial_load = without is not None
        with context:
            restored = self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]
        return treedef.unflatten([restored[k] for k in wanted])

    def close(self) -> None:
        """Wait for saves under way."""
        self._checkpointer.close()


def check_config(run_dir: Path, config: dict[str, Any], ignore: Collection[str] = ()) -> None:
    """Raises CheckpointError where `run_dir` holds a run of another configuration; `config` is `config.to_json`'s.

    Fields in `ignore` may differ.
    """
    file = run_dir / "config.json"
    if not file.exists():
        return
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}; name another directory, or delete this one") from error
    old, new = ({k: v for k, v in side.items() if k not in ignore} for side in (saved, config))
    found = differences(old, new)
    if found:
        shown = "\n  ".join(found)
        raise CheckpointError(
            f"{run_dir} holds a run with another configuration:\n  {shown}\nname another directory, or delete this one"
        )


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Write `config.json`, once the data have turned out to be readable: before that there is no run to hold on to."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
