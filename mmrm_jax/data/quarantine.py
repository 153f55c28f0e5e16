"""A quarantine file that several processes add to: each has a file of its own until they are merged."""

from __future__ import annotations

from pathlib import Path

from mmrm_jax.data.records import read_quarantine, write_quarantine
from mmrm_jax.distributed import barrier, is_main, other_files
from mmrm_jax.types import Quarantined


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
