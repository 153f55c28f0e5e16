"""What every builder of preference files does: read, check each image once, write, and keep account."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from mmrm_jax.data.images import ImageError, load_image
from mmrm_jax.data.overlap import Overlap, Seen, overlaps, seen, write_overlaps
from mmrm_jax.data.quarantine import keep_quarantine
from mmrm_jax.data.records import DataError, each_group, nothing_usable, raise_first, split_format, write_quarantine
from mmrm_jax.data.tfds import quiet_tfds
from mmrm_jax.data.tfds.features import encode_group, group_features
from mmrm_jax.types import Group, Quarantined


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
    """The data set's directory, the reports beside it, what became of each file, and what splits have in common."""

    directory: Path
    quarantine_file: Path
    reports: tuple[FileReport, ...]
    quarantined: tuple[Quarantined, ...]
    duplicates_file: Path
    overlaps: tuple[Overlap, ...]


class GroupBuilder(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder of groups, in the order of their files. Subclasses say which files make which split.

    `reports`, `quarantined` and `seen` (of each split) are filled while the data set is generated.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs: Any) -> None:
        self.reports: list[FileReport] = []
        self.quarantined: list[Quarantined] = []
        self.seen: dict[str, list[Seen]] = {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Preference groups: an image and a prompt with responses and comparisons among them.",
            features=group_features(),
            disable_shuffling=True,  # rows stay where the file has them; training shuffles anyway
        )

    def _generate_examples(
        self,
        split: str,
        files: Sequence[str | Path],
        *,
        image_root: Path | None,
        environment: str | None = None,
        strict: bool,
        wanted: Callable[[Group], bool] = lambda group: True,
        record: bool = True,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (key, example) of every wanted group whose images decode; raises DataError where a file has none.

        Rows that make no group are put on record, unless the files are read for another split, which does it.
        """
        key, known = 0, {}
        problems: dict[Path, str | None] = {}
        mine = self.seen.setdefault(split, [])
        for spec in files:
            path = split_format(spec)[0]
            quarantined: list[Quarantined] = []
            written = comparisons = left = 0
            rows = each_group(spec, image_root=image_root, environment=environment)
            for each in track(rows, description=escape(f"{path.name} → {split}"), console=Console(stderr=True)):
                if isinstance(each, Group):
                    if not wanted(each):
                        left += 1
                        continue
                    problem = _image_problem(each, problems)
                    if problem is None:
                        mine.append(seen(each, known))
                        yield key, encode_group(each)
                        key, written, comparisons = key + 1, written + 1, comparisons + len(each.comparisons)
                        continue
                    each = Quarantined(each.file, each.row, problem, each.id)
                elif not record:
                    continue
                quarantined.append(each)
                if strict:
                    raise_first(quarantined)
            if not written + left:
                raise nothing_usable(path, quarantined)
            self.reports.append(FileReport(split, path, written, comparisons, len(quarantined)))
            self.quarantined += sorted(quarantined, key=lambda entry: entry.row)
        if not key:
            raise DataError(f"no group of the split {split!r} can be used; see what was left out", self.quarantined)


def _image_problem(group: Group, problems: dict[Path, str | None]) -> str | None:
    """Why one of the group's images cannot be used, if so; each file is decoded once, `problems` has the outcome."""
    found = (_outcome(image, problems) for image in group.images)
    return next((problem for problem in found if problem is not None), None)


def _outcome(image: Path | bytes, problems: dict[Path, str | None]) -> str | None:
    if isinstance(image, Path) and image in problems:
        return problems[image]
    problem = None
    try:
        load_image(image)
    except ImageError as error:
        problem = f"unusable image: {error}; replace the file or remove the row"
    if isinstance(image, Path):
        problems[image] = problem
    return problem


def write_data_set(builder: Callable[[], GroupBuilder], out_dir: Path, manual_dir: Path | None = None) -> PrepareResult:
    """Write a builder's data set, `quarantine.jsonl` and `duplicates.jsonl` under `out_dir`.

    Raises DataError where a file holds nothing usable (its rows are in `quarantine.jsonl` all the same), or `out_dir`
    already holds the data set.
    """
    quarantine_file, duplicates_file = out_dir / "quarantine.jsonl", out_dir / "duplicates.jsonl"
    with quiet_tfds(), keep_quarantine(quarantine_file):
        made = builder()
        directory = Path(made.data_dir)
        if directory.exists():
            raise DataError(f"{directory} already holds a prepared data set: delete it or choose another directory")
        with tempfile.TemporaryDirectory() as downloads:  # TFDS insists on a folder, though nothing is downloaded
            config = tfds.download.DownloadConfig(manual_dir=manual_dir)
            made.download_and_prepare(download_dir=downloads, download_config=config)
    write_quarantine(quarantine_file, made.quarantined)
    shared = overlaps(made.seen)
    write_overlaps(duplicates_file, shared)
    reports, quarantined = tuple(made.reports), tuple(made.quarantined)
    return PrepareResult(directory, quarantine_file, reports, quarantined, duplicates_file, tuple(shared))
