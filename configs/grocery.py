"""Grocery photos: what shortcut-aware training changes on real images and real text.

    mmrm matrix configs/grocery.py --root ../shared/data/grocery

Smartphone photos and product descriptions; in `packages` and `produce` the kind of product described (long texts of
packages, short ones of produce) predicts the label, each the other way round; in `neutral` text alone says nothing. The
same command works on any folder with files of these names; `--env NAME=TRAIN,TEST` names others.

Two CPU cores. Settings were chosen on held-out images with standard training on `train` alone: one seed, 700 steps and
an earlier packaged model gave accuracies of .956 on train, .779 on train_produce and .756 on train_neutral, held out.
The full table has not been measured yet: see "Known gaps" in CHANGELOG.md.
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
