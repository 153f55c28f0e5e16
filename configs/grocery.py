"""Grocery photos: what shortcut-aware training changes on real images and real text.

    mmrm matrix configs/grocery.py --root ../shared/data/grocery

Smartphone photos and product descriptions; in `packages` and `produce` the kind of product described (long texts of
packages, short ones of produce) predicts the label, each the other way round; in `neutral` text alone says nothing. The
same command works on any folder with files of these names; `--env NAME=TRAIN,TEST` names others.
"""

from pathlib import Path

from mmrm_jax.config import DataConfig, Environment, MatrixConfig, OptimizerConfig, TrainConfig

config = MatrixConfig(
    title="Grocery photos: what shortcut-aware training changes",
    out=Path("runs/grocery"),
    environments=(
        Environment("packages", "train.jsonl", "test.jsonl"),
        Environment("produce", "train_produce.jsonl", "test_ood.jsonl"),
        Environment("neutral", "train_neutral.jsonl", "test_neutral.jsonl"),
    ),
    jobs=2,
    train=TrainConfig(
        batch_size=16,
        steps=700,
        optimizer=OptimizerConfig(learning_rate=2e-3),
        data=DataConfig(holdout=0.1, buckets=3, max_tiles=4),
    ),
)
