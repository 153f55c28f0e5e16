"""Orbax checkpoints of the train state, with checksums, and which of them are kept.

The state is saved as a flat mapping of parameter paths to arrays, so every array's name, shape and dtype is checked
on the way back. The position in the data needs no file of its own: it is the step (see `data.pipeline.BatchPlan`).
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mmrm_jax.config import TrainConfig
from mmrm_jax.distributed import any_process, is_main
from mmrm_jax.files import write_atomic
from mmrm_jax.train.manifest import add_metrics, damage, read_manifest, write_manifest
from mmrm_jax.types import PyTree

Warn = Callable[[str], None]


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit the run; the message says how."""


def _flat(tree: PyTree) -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}, treedef


def kept_steps(metrics: Mapping[int, float | None], config: TrainConfig) -> set[int]:
    """The checkpoints to keep, of steps and their values of `best_metric`: the newest, and the best of those with one.

    Of equal values the newer is better.
    """
    sign = 1 if config.best_is == "highest" else -1
    best = sorted((sign * value, step) for step, value in metrics.items() if value is not None)
    return {*sorted(metrics)[-config.keep_last :], *(step for _, step in best[max(0, len(best) - config.keep_best) :])}


class Checkpoints:
    """The checkpoints of one run directory. Saving is asynchronous; `close` waits for it.

    Once Orbax has put a checkpoint into its place, a thread of each process adds the checksums of its share. Older
    checkpoints are deleted after that, when the next save begins or at `close`: there is always a complete one.
    Every method is to be called by all processes.
    """

    def __init__(self, directory: Path, config: TrainConfig | None = None):
        self._checkpointer = ocp.training.Checkpointer(str(directory.resolve()))
        self._config = TrainConfig() if config is None else config
        self._thread = ThreadPoolExecutor(1)
        self._sealing: list[Future[None]] = []
        self.directory = directory
        manifests = {found.step: read_manifest(self._folder(found.step)) for found in self._checkpointer.checkpoints}
        self._metrics = {step: self._ranked({} if m is None else m["metrics"]) for step, m in manifests.items()}

    def _ranked(self, metrics: Mapping[str, float | None]) -> float | None:
        return metrics.get(self._config.best_metric)

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _mark(self, step: int) -> Path:
        """A file that is there while the step's folder is being deleted, which takes more than a moment."""
        return self.directory / f"{step}.deleting"

    def _damage(self, step: int) -> str | None:
        if self._mark(step).exists():
            return "its deletion was begun"
        return damage(self._folder(step), part=jax.process_index(), parts=jax.process_count())

    def latest(self, warn: Warn = warnings.warn) -> int | None:
        """The step of the newest checkpoint that is whole, after reading it; None where there is none at all.

        A damaged one is passed over with a warning. One without a manifest, of a process killed before it wrote that,
        is taken only where there is no other. Raises CheckpointError where all are damaged.
        """
        problems = {}
        for step in sorted(self._metrics, reverse=True):
            found = self._damage(step)
            if not any_process(found is not None):
                return step
            problems[step] = found or "another process found it damaged"
            warn(f"{self.directory}: checkpoint {step} is passed over: {problems[step]}")
        for step in problems:
            if not any_process(self._mark(step).exists() or read_manifest(self._folder(step)) is not None):
                warn(f"{self.directory}: checkpoint {step} is used, though its checksums are missing")
                return step
        if problems:
            raise CheckpointError(f"{self.directory} holds no checkpoint that is whole: delete it to begin again")
        return None

    def check(self, step: int) -> None:
        """Raises CheckpointError where there is no checkpoint of `step`, or it is damaged."""
        if step not in self._metrics:
            known = ", ".join(map(str, sorted(self._metrics))) or "none"
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; it has {known}")
        found = self._damage(step)
        if any_process(found is not None):
            raise CheckpointError(f"{self.directory}: checkpoint {step} is damaged: {found or 'see another process'}")

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        pending: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Start saving `state` as `step`; waits only for a save that is still under way.

        `pending` are JSON values to go with it.
        """
        self._settle()
        self._unmark(step)
        # Unless forced, Orbax leaves out a checkpoint, even the last, while it is busy with the one before.
        response = self._checkpointer.save_checkpointables_async(
            step, {"state": _flat(state)[0]}, force=True, custom_metadata={"pending": list(pending)}
        )
        assert response is not None
        self._metrics[step] = None
        self._sealing.append(self._thread.submit(self._seal, step, response))

    def _seal(self, step: int, response: Any) -> None:
        response.result()
        write_manifest(self._folder(step), part=jax.process_index(), parts=jax.process_count())

    def rank(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add what was measured at the checkpoint of `step`, of which `best_metric` ranks it."""
        self._metrics[step] = self._ranked(metrics)
        add = functools.partial(add_metrics, self._folder(step), metrics)
        self._sealing.append(self._thread.submit(add if is_main() else lambda: None))

    def _settle(self) -> None:
        """Wait for the save under way, then delete what need not be kept."""
        if self._sealing:
            sealing, self._sealing = self._sealing, []
            for each in sealing:
                each.result()
            for step in sorted(set(self._metrics) - kept_steps(self._metrics, self._config)):
                self._delete(step)

    def _delete(self, step: int) -> None:
        if is_main():
            self._mark(step).touch()
        self._checkpointer.delete(step)
        self._unmark(step)
        del self._metrics[step]

    def _unmark(self, step: int) -> None:
        if is_main():
            self._mark(step).unlink(missing_ok=True)

    def discard_after(self, step: int) -> None:
        """Delete checkpoints newer than `step`: those of a run that starts again from there."""
        for newer in [found for found in self._metrics if found > step]:
            self._delete(newer)

    def pending(self, step: int) -> list[dict[str, Any]]:
        """What was saved as `pending` with `step`; nothing where there is no such checkpoint."""
        if step not in self._metrics:
            return []
        saved: Any = self._checkpointer.checkpointables_metadata(step).custom_metadata
        return saved["pending"] if saved else []

    def restore(self, step: int, like: PyTree, *, without: Collection[str] = ()) -> PyTree:
        """The state saved at `step`, placed and shaped as `like` (arrays or ShapeDtypeStructs with shardings).

        The mesh may be another than that it was saved from. Parts named in `without`, which `like` then lacks too, are
        not read. Raises CheckpointError listing arrays that are missing, superfluous or of another shape or dtype.
        """
        wanted, treedef = _flat(like)
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in wanted.items()}
        saved = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        saved = {k: v for k, v in saved.items() if k.partition("/")[0] not in without}
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
        context.pytree.loading.partial_load = bool(without)
        with context:
            restored = self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]
        return treedef.unflatten([restored[k] for k in wanted])

    def close(self) -> None:
        """Wait for saves under way."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The fields in which two `to_json` results differ: dotted name -> "old -> new"."""
    found = {}
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, name + ".")
        elif a != b:
            found[name] = f"{a!r} -> {b!r}"
    return found


def check_config(run_dir: Path, config: dict[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Raises CheckpointError where `run_dir` holds a run of another configuration; `config` is `config.to_json`'s.

    Fields in `ignore`, dotted where they are nested, may differ; those that do are returned, a line each.
    """
    file = run_dir / "config.json"
    if not file.exists():
        return []
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}; name another directory, or delete this one") from error
    kind, wanted = ("matrix" if "environments" in each else "run" for each in (saved, config))
    if kind != wanted:
        raise CheckpointError(f"{run_dir} holds a {kind} and no {wanted}; name another directory, or delete this one")
    found = _differences(saved, config)
    free = [name for name in found if any(name == field or name.startswith(field + ".") for field in ignore)]
    if len(found) > len(free):
        shown = "\n  ".join(f"{name}: {change}" for name, change in found.items() if name not in free)
        raise CheckpointError(
            f"{run_dir} holds a run with another configuration:\n  {shown}\nname another directory, or delete this one"
        )
    return [f"{name}: {found[name]}" for name in free]


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Write `config.json`, once data and model have turned out usable: before that there is no run to hold on to."""
    if is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / "config.json", json.dumps(config, indent=2) + "\n")
