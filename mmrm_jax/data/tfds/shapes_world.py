"""The shapes world as a TFDS data set: one builder config per environment, written without TensorFlow.

Rates, unless a config says otherwise: 10 % of the labels go against the image, and the cue of the environment agrees
with the label in 90 % of the comparisons, independently. The cue is "a long answer wins" in `long`, "a hedged answer
loses" in `hedged` and "a short answer wins" in `short`; `neutral` has long and hedged answers that say nothing about
the label, and no train split. `mmrm_jax.data.shapes` draws the comparisons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import tensorflow_datasets as tfds

from mmrm_jax.data.shapes import DEFAULT_RATES, ENVIRONMENTS, WorldRates, make_group
from mmrm_jax.data.tfds.features import encode_group, group_features

_DESCRIPTION = (
    "Scenes of one coloured shape, a question, and a right and a wrong answer in one environment of the shapes world."
)


# Not frozen: TFDS's own BuilderConfig is not, and a frozen dataclass cannot inherit from it.
@dataclasses.dataclass(eq=False)
class ShapesWorldConfig(tfds.core.BuilderConfig):
    """An environment, the number of comparisons in each split (0 leaves a split out), the seed and the rates.

    Make one with `shapes_world_config`, which also names it.
    """

    environment: str = "long"
    train: int = 8192
    validation: int = 1024
    test: int = 1024
    seed: int = 0
    rates: WorldRates = DEFAULT_RATES

    @property
    def sizes(self) -> dict[str, int]:
        """Comparisons in each split that is not empty."""
        sizes = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: size for split, size in sizes.items() if size}


def shapes_world_config(
    environment: str,
    *,
    train: int = 8192,
    validation: int = 1024,
    test: int = 1024,
    seed: int = 0,
    rates: WorldRates = DEFAULT_RATES,
) -> ShapesWorldConfig:
    """The config of an environment. "neutral" gets no train split, whatever `train` says.

    The default settings give the environment's name alone; any others are part of the name, so that data sets of
    different settings never share a directory. Raises ValueError for an unknown environment, a negative size or seed,
    or no comparison at all.
    """
    if environment not in ENVIRONMENTS:
        raise ValueError(
            f"the shapes world has no environment {environment!r}; choose one of {', '.join(ENVIRONMENTS)}"
        )
    settings: dict[str, Any] = {"train": train, "validation": validation, "test": test, "seed": seed}
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"the {name} of a shapes world is {value}; give 0 or more")
    default = (train, validation, test, seed, rates) == (8192, 1024, 1024, 0, DEFAULT_RATES)
    if environment == "neutral":
        settings["train"] = 0
    if not settings["train"] + validation + test:
        raise ValueError(f"all splits of the shapes world {environment!r} are empty; give validation or test a size")
    sizes = f"{settings['train']}-{validation}-{test}"
    suffix = f"-{sizes}-seed{seed}-agree{rates.cue_agreement}-noise{rates.label_noise}"
    if rates.image_noise != DEFAULT_RATES.image_noise:
        suffix += f"-pixels{rates.image_noise}"
    return ShapesWorldConfig(
        name=environment if default else environment + suffix, environment=environment, rates=rates, **settings
    )


class ShapesWorld(tfds.core.GeneratorBasedBuilder):
    """Comparisons of one environment of the shapes world, in the order of their index."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version.", "1.1.0": "Captions."}
    BUILDER_CONFIGS: ClassVar[list[ShapesWorldConfig]] = [
        shapes_world_config(environment) for environment in ENVIRONMENTS
    ]

    @property
    def _config(self) -> ShapesWorldConfig:
        return cast(ShapesWorldConfig, self.builder_config)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self._config
        settings = {"environment": config.environment, "seed": config.seed, **dataclasses.asdict(config.rates)}
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=group_features(),
            metadata=tfds.core.MetadataDict(settings),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        return {split: self._generate_examples(split, size) for split, size in self._config.sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, Any]]:
        config = self._config
        for index in range(size):
            yield index, encode_group(make_group(config.seed, config.environment, split, index, config.rates))


def build_shapes_world(
    data_dir: str | Path,
    *,
    environments: tuple[str, ...] = tuple(ENVIRONMENTS),
    train: int = 8192,
    validation: int = 1024,
    test: int = 1024,
    seed: int = 0,
    rates: WorldRates = DEFAULT_RATES,
) -> dict[str, Path]:
    """Write the data sets below `data_dir` where they are not there yet; returns each environment's directory.

    Read one with `tfds.builder_from_directory(path).as_data_source(split)`. Raises what `shapes_world_config` raises.
    """
    named = {config.name: config for config in ShapesWorld.BUILDER_CONFIGS}  # TFDS wants the very same object
    directories = {}
    for environment in environments:
        config = shapes_world_config(environment, train=train, validation=validation, test=test, seed=seed, rates=rates)
        builder = ShapesWorld(data_dir=str(data_dir), config=named.get(config.name, config), file_format="array_record")
        builder.download_and_prepare()
        directories[environment] = Path(builder.data_dir)
    return directories
