"""Sizes and checksums of a checkpoint's files, written once it is complete: how damage is told from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_THREADS = 4  # hashing leaves Python's lock, and one thread does 1 to 2 GB/s: about as much as a disk gives


def write_manifest(folder: Path, metrics: Mapping[str, float | None]) -> None:
    """Read every file under `folder` once and write `manifest.json`, whole or not at all; `metrics` are kept in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(_checksum, files))
    entries = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, sums, strict=True)
    }
    write_atomic(folder / MANIFEST, json.dumps({"metrics": dict(metrics), "files": entries}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where it has none that can be read: it was not finished."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in ("metrics", "files"))
    return found if whole else None


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files that the manifest of `folder` names, or None; reads one part of `parts` of them."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"it has no {MANIFEST}"
    mine = sorted(manifest["files"].items())[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda item: _problem(folder / item[0], item[1]), mine)
        return next((problem for problem in problems if problem), None)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that whoever is killed meanwhile leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


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
