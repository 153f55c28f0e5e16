"""TFDS builders of public preference data sets, from files that you download yourself.

    build_downloaded(Povid, "downloads/povid", "prepared")

The files, in the folder you give, are those of huggingface.co/datasets:

- `vl_feedback`: MMInstruction/VLFeedback; `*.jsonl` or `*.parquet`, and the images that `img_path` names.
- `povid`: YiyangAiLab/POVID_preference_data_for_VLLMs; `*.json`, and the images that `image` names (COCO's train2014).
- `rlhf_v`: openbmb/RLHF-V-Dataset; `*.parquet`, with the images in it.
- `rlaif_v`: openbmb/RLAIF-V-Dataset; `*.parquet`, with the images in it.

Each has the splits `train` and `validation`, which have no image in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mmrm_jax.data.records import DataError, each_group
from mmrm_jax.data.sources import connected, draw_holdout, image_identities
from mmrm_jax.data.tfds.builder import GroupBuilder, PrepareResult, write_data_set
from mmrm_jax.types import Group

VALIDATION = 0.05


@dataclasses.dataclass(eq=False)
class DownloadedConfig(tfds.core.BuilderConfig):
    """`validation` is the share of images held out, 0 for none; `seed` draws them; `strict` stops at a bad row."""

    validation: float = VALIDATION
    seed: int = 0
    strict: bool = False


class Downloaded(GroupBuilder, skip_registration=True):
    """A public data set: `FILES` are the patterns of its files, `FORMAT` how its rows are read."""

    FILES: ClassVar[tuple[str, ...]] = ()
    FORMAT: ClassVar[str] = ""
    BUILDER_CONFIGS: ClassVar[list[DownloadedConfig]] = [DownloadedConfig(name="default")]

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        config, folder = self.builder_config, Path(dl_manager.manual_dir)
        assert isinstance(config, DownloadedConfig)
        paths = sorted({path for pattern in self.FILES for path in folder.glob(pattern)})
        if not paths:
            raise DataError(f"{folder} has no {' or '.join(self.FILES)}. {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        files = [f"{path}@{self.FORMAT}" for path in paths]
        held = _held_out(files, folder, config) if config.validation else set()
        sides = {"train": False, "validation": True} if held else {"train": False}
        return {
            split: self._generate_examples(
                split,
                files,
                image_root=folder,
                environment=self.name,  # whatever the parts that it comes in are called
                strict=config.strict,
                wanted=lambda group, side=side: ((group.file, group.row) in held) == side,
                record=not side,
            )
            for split, side in sides.items()
        }


def _held_out(files: Sequence[str], folder: Path, config: DownloadedConfig) -> set[tuple[str, int]]:
    """(file, row) of the groups of the validation split: all that show an image which is drawn."""
    known: dict[Path, str] = {}
    places, found = [], []
    for file in files:
        for group in each_group(file, image_root=folder):
            if not isinstance(group, Group):
                continue
            try:
                found.append(image_identities(group, known))
            except DataError:  # an image that cannot be read is quarantined when its row is written
                continue
            places.append((group.file, group.row))
    held = draw_holdout(connected(found), config.validation, config.seed)
    return {place for place, out in zip(places, held, strict=True) if out}


class VlFeedback(Downloaded):
    """VLFeedback: four completions a prompt, rated by GPT-4V."""

    FILES = ("*.jsonl", "*.parquet")
    FORMAT = "vlfeedback"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download MMInstruction/VLFeedback from huggingface.co/datasets: its rows (JSONL or Parquet) and its images, "
        "unpacked so that img_path is relative to the folder."
    )


class Povid(Downloaded):
    """POVID: answers beside answers with hallucinations put in."""

    FILES = ("*.json",)
    FORMAT = "povid"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download YiyangAiLab/POVID_preference_data_for_VLLMs from huggingface.co/datasets (a JSON list), and the "
        "images it names (COCO's train2014), so that `image` is relative to the folder."
    )


class RlhfV(Downloaded):
    """RLHF-V: answers beside what people corrected them to."""

    FILES = ("*.parquet",)
    FORMAT = "rlhf-v"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the Parquet file of openbmb/RLHF-V-Dataset from huggingface.co/datasets; the images are in it."
    )


class RlaifV(Downloaded):
    """RLAIF-V: pairs of answers judged by open models."""

    FILES = ("*.parquet",)
    FORMAT = "rlaif-v"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the Parquet files of openbmb/RLAIF-V-Dataset from huggingface.co/datasets; the images are in them."
    )


def build_downloaded(
    builder: type[Downloaded],
    folder: str | Path,
    out_dir: str | Path,
    *,
    validation: float = VALIDATION,
    seed: int = 0,
    strict: bool = False,
) -> PrepareResult:
    """Write a public data set from the files in `folder` to `out_dir`, with its reports as `prepare` does.

    Raises ValueError for a `validation` outside [0, 1), and DataError as `prepare` does or where the files are missing.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; it must be at least 0 and below 1")
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is no directory. {builder.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    config = DownloadedConfig(
        name=f"validation-{validation}-seed-{seed}", validation=validation, seed=seed, strict=strict
    )
    return write_data_set(
        lambda: builder(config=config, data_dir=str(out_dir), file_format="array_record"), Path(out_dir), Path(folder)
    )
