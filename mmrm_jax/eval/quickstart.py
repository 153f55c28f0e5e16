"""The embedded default: the shapes world, from building its data to the matrix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmrm_jax.config import DataConfig, Environment, MatrixConfig, OptimizerConfig, TrainConfig
from mmrm_jax.data.shapes import DEFAULT_RATES, WorldRates
from mmrm_jax.data.tfds import quiet_tfds
from mmrm_jax.data.tfds.shapes_world import build_shapes_world
from mmrm_jax.tiny import LEARNING_RATE

COMPARISONS = 8192

# The rates of the world are documented in `data.shapes`; these settings were chosen on the validation split.
CONFIG = MatrixConfig(
    out=Path("runs/quickstart"),
    title="Shapes world: what shortcut-aware training changes",
    train=TrainConfig(
        batch_size=64,
        steps=500,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_fraction=0.05),
        data=DataConfig(holdout=0.0),
    ),
)


def with_shapes_world(
    config: MatrixConfig, data_dir: Path, comparisons: int, rates: WorldRates = DEFAULT_RATES
) -> MatrixConfig:
    """Build the shapes world below `data_dir` where it is missing, and point the configuration at it.

    `comparisons` are those of each training set; what is tested on, `config.on`, has an eighth of them. Raises
    ValueError where that is none.
    """
    if comparisons < 8:
        raise ValueError(f"comparisons is {comparisons}; a test set has an eighth of them, so give at least 8")
    validation, test = ((comparisons // 8) * (config.on == split) for split in ("validation", "test"))
    with quiet_tfds():
        folders = build_shapes_world(data_dir, train=comparisons, validation=validation, test=test, rates=rates)
    environments = tuple(
        Environment(
            name,
            train=None if name == "neutral" else f"{folder}:train",
            validation=f"{folder}:validation" if config.on == "validation" else None,
            test=f"{folder}:test",
        )
        for name, folder in folders.items()
    )
    return dataclasses.replace(config, environments=environments, root=Path("."))
