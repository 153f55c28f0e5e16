"""Preference files of any known format as one TFDS data set: a split a file, every image checked once."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from mmrm_jax.data.images import ImageError, load_image
from mmrm_jax.data.quarantine import keep_quarantine
from mmrm_jax.data.records import DataError, nothing_usable, raise_first, read_groups, write_quarantine
from mmrm_jax.data.tfds import quiet_tfds
from mmrm_jax.data.tfds.features import encode_group, group_features
from mmrm_jax.types import Group, Quarantined


@dataclasses.dataclass(eq=False)
class PreferenceFilesConfig(tfds.core.BuilderConfig):
    """Which files to read: `files` maps split names to paths; `strict` raises at the first bad row."""

    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    image_root: Path | None = None
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What became of one file: the number of groups and comparisons written, and of quarantined entries."""

    split: str
    file: Path
    groups: int
    comparisons: int
    quarantined: int


@dataclasses.dataclass(frozen=True)
class PrepareResult:
    """The data set's directory, the quarantine report beside it, and what became of each file."""

    directory: Path
    quarantine_file: Path
    reports: tuple[FileReport, ...]
    quarantined: tuple[Quarantined, ...]


class PreferenceFiles(tfds.core.GeneratorBasedBuilder):
    """TFDS builder for the files of its config. Groups keep the order of their file.

    `reports` and `quarantined` are filled while the data set is generated.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs: Any) -> None:
        self.reports: list[FileReport] = []
        self.quarantined: list[Quarantined] = []
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Preference groups: an image and a prompt with responses and comparisons among them.",
            features=group_features(),
            disable_shuffling=True,  # rows stay where the file has them; training shuffles anyway
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split, path) for split, path in self._config.files.items()}

    def _generate_examples(self, split: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (key, example) of every group whose image decodes; raises DataError where none does."""
        config = self._config
        groups, quarantined = read_groups(path, image_root=config.image_root)
        if config.strict:
            raise_first(quarantined)
        problems: dict[Path, str | None] = {}
        written = comparisons = 0
        for group in track(groups, description=f"{path.name} → {split}", console=Console(stderr=True)):
            problem = _image_problem(group, problems)
            if problem is None:
                yield written, encode_group(group)
                written += 1
                comparisons += len(group.comparisons)
                continue
            quarantined.append(Quarantined(group.file, group.row, problem, group.id))
            if config.strict:
                raise_first(quarantined)
        if not written:
            raise nothing_usable(path, quarantined)
        self.reports.append(FileReport(split, path, written, comparisons, len(quarantined)))
        self.quarantined += sorted(quarantined, key=lambda entry: entry.row)

    @property
    def _config(self) -> PreferenceFilesConfig:
        config = self.builder_config
        if not isinstance(config, PreferenceFilesConfig):
            raise TypeError("PreferenceFiles needs config=PreferenceFilesConfig(name=..., files={split: path})")
        return config


def _image_problem(group: Group, problems: dict[Path, str | None]) -> str | None:
    """Why the group's image cannot be used, if so; each file is decoded once, `problems` remembers the outcome."""
    if not isinstance(group.image, Path):
        return None
    if group.image not in problems:
        try:
            load_image(group.image)
            problems[group.image] = None
        except ImageError as error:
            problems[group.image] = f"unusable image: {error}; replace the file or remove the row"
    return problems[group.image]


def prepare(
    files: Sequence[str | Path] | Mapping[str, str | Path],
    out_dir: str | Path,
    *,
    image_root: str | Path | None = None,
    strict: bool = False,
) -> PrepareResult:
    """Read the files, decode every image once, and write the data set and `quarantine.jsonl` under `out_dir`.

    `files` is a mapping from split names to files, or a sequence of files, each of which becomes the split named after
    its stem, or after SPLIT where it is given as SPLIT=FILE. Raises DataError where a file holds nothing usable (its
    rows are in `quarantine.jsonl` all the same), two files would share a split, `out_dir` already holds a prepared data
    set, or, with `strict`, at the first bad row.
    """
    named = _named_splits(files)
    out_dir = Path(out_dir)
    config = PreferenceFilesConfig(
        name="default",
        files=named,
        image_root=None if image_root is None else Path(image_root),
        strict=strict,
    )
    quarantine_file = out_dir / "quarantine.jsonl"
    with quiet_tfds(), keep_quarantine(quarantine_file):
        builder = PreferenceFiles(config=config, data_dir=out_dir, file_format="array_record")
        directory = Path(builder.data_dir)
        if directory.exists():
            raise DataError(f"{directory} already holds a prepared data set: delete it or choose another directory")
        with tempfile.TemporaryDirectory() as downloads:  # TFDS insists on a folder, though nothing is downloaded
            builder.download_and_prepare(download_dir=downloads)
    write_quarantine(quarantine_file, builder.quarantined)
    return PrepareResult(directory, quarantine_file, tuple(builder.reports), tuple(builder.quarantined))


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
    split, _, named = str(file).partition("=")
    if named and re.fullmatch(r"\w+", split) and not Path(file).exists():
        return split, Path(named)
    return re.sub(r"\W", "_", Path(file).stem), Path(file)
