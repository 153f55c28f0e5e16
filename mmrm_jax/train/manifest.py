"""Sizes and checksums of a checkpoint's files, written once it is complete: how damage is told from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmrm_jax.files import write_atomic

_NAME = re.compile(r"manifest-(\d+)-of-(\d+)\.json")
_THREADS = 4  # hashing leaves Python's lock, and one thread does 1 to 2 GB/s: about as much as a disk gives


def write_manifest(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Read this process's share of the files under `folder` once and write its manifest, whole or not at all.

    The share follows from the names, so that processes need not agree first.
    """
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file() and not _NAME.match(f.name)}
    mine = {name: file for name, file in sorted(files.items()) if zlib.crc32(name.encode()) % parts == part}
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(_checksum, mine.values()))
    entries = {
        name: {"size": file.stat().st_size, "sha256": digest}
        for (name, file), digest in zip(mine.items(), sums, strict=True)
    }
    text = json.dumps({"metrics": {}, "files": entries}, indent=1) + "\n"
    write_atomic(folder / f"manifest-{part}-of-{parts}.json", text)


def add_metrics(folder: Path, metrics: Mapping[str, float | None]) -> None:
    """Write what was measured at a checkpoint into the first of its manifests, in place of what is there.

    That may be of another number of processes, and is missing where a process was killed before it wrote it.
    """
    for file in folder.glob("manifest-0-of-*.json"):
        found = json.loads(file.read_text())
        write_atomic(file, json.dumps(found | {"metrics": dict(metrics)}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifests of all processes together; None where one is missing or cannot be read: it was not finished."""
    names = [found for file in folder.glob("manifest-*.json") if (found := _NAME.fullmatch(file.name))]
    parts = int(names[0][2]) if names else 0
    metrics: dict[str, float | None] = {}
    files: dict[str, Any] = {}
    for part in range(parts):
        try:
            found = json.loads((folder / f"manifest-{part}-of-{parts}.json").read_text())
            metrics |= found["metrics"]
            files |= found["files"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
    return {"metrics": metrics, "files": files} if parts else None


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files that the manifest of `folder` names, or None; reads one part of `parts` of them."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "its checksums are missing"
    mine = sorted(manifest["files"].items())[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda item: _problem(folder / item[0], item[1]), mine)
        return next((problem for problem in problems if problem), None)


def _problem(file: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            return f"{file} has {size} bytes of {entry['size']}"
        return None if _checksum(file) == entry["sha256"] else f"{file} has changed: its SHA-256 is another"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
