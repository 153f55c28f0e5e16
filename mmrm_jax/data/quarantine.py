"""Quarantine files: kept where nothing is left to use, and added to by several processes, each in a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mmrm_jax.data.records import DataError, read_quarantine, write_quarantine
from mmrm_jax.distributed import barrier, is_main, other_files
from mmrm_jax.types import Quarantined


def refused_file(run_dir: Path) -> Path:
    """Where a command that cannot begin in `run_dir` says why; a run that is there already keeps its own record."""
    began = (run_dir / "config.json").exists()
    return run_dir / ("quarantine-refused.jsonl" if began else "quarantine.jsonl")


@contextlib.contextmanager
def keep_quarantine(path: Path) -> Iterator[None]:
    """Write what a DataError of the block has quarantined to `path`, and name that file in the error."""
    try:
        yield
    except DataError as error:
        if not error.quarantined:
            raise
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_quarantine(path, error.quarantined)
        raise DataError(f"{error}\nall of them: {path}") from error


def clear_quarantine(path: Path) -> None:
    """Delete what an earlier run left at `path`, and what its processes did; every process is to call it."""
    if is_main():
        for file in (path, *other_files(path)):
            file.unlink(missing_ok=True)
    barrier(f"clear {path.name}")


def merge_quarantine(path: Path) -> list[Quarantined]:
    """Bring what every process found together at `path`, each entry once; every process is to call it, and gets all."""
    barrier(f"merge {path.name}")
    if is_main() and (others := other_files(path)):
        found = [entry for file in (path, *others) for entry in read_quarantine(file)]
        write_quarantine(path, dict.fromkeys(found))
        for file in others:
            file.unlink()
    barrier(f"merged {path.name}")
    return read_quarantine(path)
