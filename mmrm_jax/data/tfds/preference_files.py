"""Preference files of any known format as one TFDS data set: a split a file, every image checked once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mmrm_jax.data.records import DataError, split_format, split_name
from mmrm_jax.data.tfds.builder import GroupBuilder, PrepareResult, write_data_set


@dataclasses.dataclass(eq=False)
class PreferenceFilesConfig(tfds.core.BuilderConfig):
    """Which files to read: `files` maps split names to FILE or FILE@FORMAT; `strict` raises at the first bad row."""

    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    image_root: Path | None = None
    strict: bool = False


class PreferenceFiles(GroupBuilder):
    """TFDS builder for the files of its config."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        if not isinstance(config, PreferenceFilesConfig):
            raise TypeError("PreferenceFiles needs config=PreferenceFilesConfig(name=..., files={split: path})")
        settings: dict[str, Any] = {"image_root": config.image_root, "strict": config.strict}
        return {split: self._generate_examples(split, [file], **settings) for split, file in config.files.items()}


def prepare(
    files: Sequence[str | Path] | Mapping[str, str | Path],
    out_dir: str | Path,
    *,
    image_root: str | Path | None = None,
    strict: bool = False,
) -> PrepareResult:
    """Read the files, decode every image once, and write the data set and its reports under `out_dir`.

    `quarantine.jsonl` has what could not be used, `duplicates.jsonl` the groups whose images another split shows, too.
    `files` is a mapping from split names to files, or a sequence of files, each of which becomes the split named after
    its stem, or after SPLIT where it is given as SPLIT=FILE; FILE@FORMAT names a file's format. Raises DataError where
    a file holds nothing usable (its rows are in `quarantine.jsonl` all the same), two files would share a split,
    `out_dir` already holds a prepared data set, or, with `strict`, at the first bad row.
    """
    config = PreferenceFilesConfig(
        name="default",
        files=_named_splits(files),
        image_root=None if image_root is None else Path(image_root),
        strict=strict,
    )
    out_dir = Path(out_dir)
    return write_data_set(lambda: PreferenceFiles(config=config, data_dir=out_dir, file_format="array_record"), out_dir)


def _named_splits(files: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Split name → file. TFDS wants letters, digits and underscores."""
    if isinstance(files, Mapping):
        pairs = [(split, Path(file)) for split, file in files.items()]
    else:
        pairs = [_split_of(file) for file in files]
    if not pairs:
        raise DataError("no files to prepare: name at least one preference file")
    named: dict[str, Path] = {}
    for split, file in pairs:
        if not re.fullmatch(r"\w+", split):
            raise DataError(f"split name {split!r} for {file} may only have letters, digits and underscores")
        if split in named:
            raise DataError(
                f"{named[split]} and {file} would both become split {split!r}: name the splits, as in "
                f"{split}={named[split]} {split}_2={file}"
            )
        named[split] = file
    return named


def _split_of(file: str | Path) -> tuple[str, Path]:
    """(split, file) of SPLIT=FILE, or of a file alone, which is a split of its own name."""
    split, named = split_name(str(file))
    return split or re.sub(r"\W", "_", split_format(named)[0].stem), Path(named)
