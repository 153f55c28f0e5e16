"""Reference values: the folder that MMRM_GOLDENS names, or shared/goldens beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("MMRM_GOLDENS") or Path(__file__).resolve().parents[2] / "shared" / "goldens")


def fixtures(name: str, *files: str) -> list:
    """For `pytest.mark.parametrize`: every folder of the set that holds `files` and is called `PREFIX_name...`.

    Sets differ in the prefix, which has no underscore. Where none is found, one parameter that is skipped and says so.
    """
    folders = sorted(ROOT.glob("*_*")) if ROOT.is_dir() else []
    found = [
        folder
        for folder in folders
        if folder.name.partition("_")[2].startswith(name) and all((folder / file).exists() for file in files)
    ]
    if not found:
        reason = f"no reference data: {ROOT} has no folder *_{name}* with {', '.join(files)}"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    return [pytest.param(folder, id=folder.name) for folder in found]


def sibling(folder: Path, name: str) -> Path:
    """The folder of the same set that a fixture names by another folder's name; its prefix may have been changed."""
    prefix = folder.name.partition("_")[0]
    return folder.parent / f"{prefix}_{name.partition('_')[2]}"
