"""Configuration: frozen dataclasses that say everything a run depends on.

Experiments live in `configs/` as Python files that build one of these; the command line overrides single fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

from mmrm_jax.model_config import (  # noqa: F401 - what describes a model is imported from here too
    DecoderConfig,
    DecoderFamily,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    ModelConfig,
    Remat,
    RopeScaling,
    VisionConfig,
)

BranchInput = Literal["multimodal", "blank", "absent", "image_only", "caption"]
TEXT_VIEWS = ("absent", "caption")  # inputs without an image


def _check(config: Any, rule: str, **fits: bool) -> None:
    """Raises ValueError for the first field that does not fit, with its value and the rule."""
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be {rule}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up from 0 and cosine decay to 0 (the recipe in the paper's code).

    Attributes:
        learning_rate: The schedule's highest; the default is the paper's, for billions of parameters.
        b1: Decay of the mean of gradients from step to step.
        b2: Decay of the mean of their squares.
        eps: Added to the root of that mean, by which an update is divided.
        weight_decay: Share of a parameter taken off at every step, times the learning rate.
        clip_norm: Most that the norm of all gradients together may be; larger ones are scaled down.
        warmup_fraction: Share of the steps over which the learning rate rises.
        decay_groups: What weight decay spares: "uniform" biases and the scales of norms and layers, in both branches
            alike; "reference" what the paper's code does, where a proxy beside a primary is not decayed at all, and
            scales are decayed but for those of layer norms and of the RMS norms of Qwen and Llama decoders.
        proxy_rate: Learning rate of the proxy over that of the other branches.
        head_start: Steps in which the proxy alone is updated, of objectives that have one.
    """

    learning_rate: float = 1e-5
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    warmup_fraction: float = 0.1
    decay_groups: Literal["uniform", "reference"] = "uniform"
    proxy_rate: float = 1.0
    head_start: int = 0

    def __post_init__(self) -> None:
        _check(self, "above 0 and finite", learning_rate=0 < self.learning_rate < math.inf)
        _check(self, "above 0", clip_norm=self.clip_norm > 0)
        _check(self, "at least 0 and finite", eps=0 <= self.eps < math.inf)
        _check(self, "at least 0 and finite", weight_decay=0 <= self.weight_decay < math.inf)
        _check(self, "at least 0 and below 1", b1=0 <= self.b1 < 1, b2=0 <= self.b2 < 1)
        _check(self, "from 0 to 1", warmup_fraction=0 <= self.warmup_fraction <= 1)
        _check(self, "above 0 and finite", proxy_rate=0 < self.proxy_rate < math.inf)
        _check(self, "at least 0", head_start=self.head_start >= 0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Mesh axis sizes; `data` = -1 takes the devices that are left.

    Attributes:
        data: Copies of the model; each sees its share of the batch.
        fsdp: Parts that every parameter is kept in, which are gathered layer by layer; the batch is split over it too.
        tensor: Parts that heads and MLPs are computed in.
        dcn_data: Slices that the data axis spans, where only the data-centre network joins them; a divisor of `data`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = 1

    def __post_init__(self) -> None:
        _check(self, "at least 1", fsdp=self.fsdp >= 1, tensor=self.tensor >= 1, dcn_data=self.dcn_data >= 1)
        _check(self, "at least 1, or -1 for all that are left", data=self.data >= 1 or self.data == -1)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): y = x W + alpha / rank (x A) B, with W frozen.

    A branch with adapters trains them and its score head and nothing else; A starts as N(0, 1 / inputs) and B as 0,
    so that training starts from the base model exactly. What is frozen exists once, whatever the number of branches:
    with adapters on all of them, primary and proxy share one trunk.

    Attributes:
        rank: Columns of A and rows of B; 0 trains without adapters.
        alpha: Scale of what the adapters add, over the rank.
        targets: What is adapted: every linear layer of a part of the model (vision, projector, decoder), or one kind of
            them, such as decoder.q. A branch without an image has no adapters in parts it does not use.
        branches: Branches with adapters; None is every branch of the objective.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("decoder",)
    branches: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check(self, "at least 1, or 0 to train without adapters", rank=self.rank >= 0)
        _check(self, "above 0", alpha=0 < self.alpha < math.inf)
        if self.rank and not (self.targets and self.branches != ()):
            empty = "branches" if self.targets else "targets"
            raise ValueError(f"LoraConfig.{empty} is empty; name at least one, or set rank 0 to train without adapters")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of the images of training, drawn anew for every step; evaluation sees images as they are.

    Attributes:
        crop: Least share of an image's area that is shown, from 0 to 1; 1 shows all of it.
        mirror: Mirror half of the images left to right. Not where prompts or responses speak of sides or read text.
        brightness: Most by which brightness is raised or lowered, as a share of it.
    """

    crop: float = 1.0
    mirror: bool = False
    brightness: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "above 0 and at most 1", crop=0 < self.crop <= 1)
        _check(self, "at least 0 and below 1", brightness=0 <= self.brightness < 1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How groups become batches.

    Attributes:
        max_length: Token budget of one conversation; longer rows are quarantined, never truncated.
        max_tiles: Most image tiles per group, not counting the thumbnail; None takes the checkpoint's own value.
        buckets: Most shapes that batches are padded to, and so compilations of a step; more of them waste less.
        workers: Grain worker processes; 0 reads in the training process.
        holdout: Share of each training file, split off by image, on which choices are made.
        holdout_seed: Which share that is.
        cache: Keep encoded groups in memory: decoding and tokenising happen once. For small data sets.
        join: Most training rows of one image and prompt that become one group, encoded once; sizes count groups.
        augment: Random changes of the images of training.
        features: Folder in which what a frozen vision tower makes of each image is kept, so that it runs once an image
            and not in every step; None keeps nothing. Without augmentation and drop path.
    """

    max_length: int = 4096
    max_tiles: int | None = None
    buckets: int = 2
    workers: int = 0
    holdout: float = 0.1
    holdout_seed: int = 0
    cache: bool = True
    join: int = 1
    augment: Augmentation = Augmentation()
    features: Path | None = None

    def __post_init__(self) -> None:
        _check(self, "at least 1", join=self.join >= 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        objective: A name of docs/objectives.md: NAME, NAME:OPTION=VALUE,..., or either with +MODIFIER behind it.
        proxy_input: What the text-only proxy sees in place of the image: nothing (absent) or a white tile (blank).
        batch_size: Groups per optimiser step, over all devices.
        micro_batches: Parts the batch is split into to save memory; the result is the same.
        eval_batch_size: Groups per evaluation step.
        steps: Optimiser steps; None trains for `epochs` passes over the data.
        epochs: Passes over the data.
        seed: Seeds the order of the data and what the checkpoint lacks (the score head).
        freeze: Parts that are not trained: any of vision, projector, decoder, score.
        drop_path_rate: Of stochastic depth in the vision tower, frozen or not; None takes the checkpoint's own value.
        compute_dtype: Of activations and matrix products; parameters, head, margins and losses are float32.
        optimizer: AdamW and its schedule.
        mesh: Device mesh.
        data: How groups become batches.
        log_every: Steps per entry of metrics.jsonl.
        eval_every: Steps between evaluations on the held-out part; None evaluates at the end only.
        checkpoint_every: Steps between checkpoints; None saves at the end only.
        strict: Stop at the first row that cannot be used, instead of reporting it in the quarantine.
        remat: What of each layer the backward pass computes again to save memory: nothing (none), all but matrix
            products with weights (dots), or everything (full). On one CPU none keeps of deep stacks no more than what
            attention over long sequences gave, less than dots, at little cost. The result is the same.
        lora: Train adapters in place of whole branches.
        frozen_dtype: In which frozen parameters are kept, but for the score head; bfloat16 halves their memory.
        keep_last: Newest checkpoints that are kept. Where the last turns out to be damaged, the one before is used.
        keep_best: Checkpoints that are kept beside these for their `best_metric`; they are made where an evaluation is.
        best_metric: Entry of metrics.jsonl that an evaluation on the held-out part leaves.
        best_is: Which values of it are best.
    """

    objective: str = "shortcut_aware"
    proxy_input: Literal["absent", "blank"] = "absent"
    batch_size: int = 128
    micro_batches: int = 1
    eval_batch_size: int = 256
    steps: int | None = None
    epochs: float = 1.0
    seed: int = 0
    freeze: tuple[str, ...] = ("vision",)
    drop_path_rate: float | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    log_every: int = 20
    eval_every: int | None = None
    checkpoint_every: int | None = 500
    strict: bool = False
    remat: Remat = "none"
    lora: LoraConfig = LoraConfig()
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = "validation/accuracy"
    best_is: Literal["highest", "lowest"] = "highest"

    @property
    def features_dtype(self) -> str | None:
        """That of the tower's features, where they stand in place of pixels."""
        return None if self.data.features is None else self.compute_dtype

    def __post_init__(self) -> None:
        names = ("batch_size", "micro_batches", "eval_batch_size", "steps", "log_every", "eval_every")
        for name in (*names, "checkpoint_every", "keep_last"):
            value = getattr(self, name)
            _check(self, "at least 1", **{name: value is None or value >= 1})
        _check(self, "above 0 and finite", epochs=0 < self.epochs < math.inf)
        _check(self, "from 0 to 2^31 - 1", seed=0 <= self.seed < 2**31)
        _check(self, "at least 0 and below 1", drop_path_rate=0 <= (self.drop_path_rate or 0.0) < 1)
        _check(self, "at least 0", keep_best=self.keep_best >= 0)
        every, evaluated = self.checkpoint_every, self.eval_every
        if self.keep_best and (every is None or evaluated is None or every % evaluated):
            raise ValueError(
                "TrainConfig.keep_best needs an evaluation at every checkpoint: checkpoint_every "
                f"({every}) must be a multiple of eval_every ({evaluated})"
            )


# Settings of a run that may change when it is resumed: what is computed does not depend on them beyond rounding.
RESUMABLE = (
    "mesh",
    "micro_batches",
    "remat",
    "eval_batch_size",
    "data.workers",
    "data.features",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "strict",
    "keep_last",
    "keep_best",
    "best_metric",
    "best_is",
)


@dataclasses.dataclass(frozen=True)
class Environment:
    """One preference distribution: a training set and the test set drawn like it.

    Paths are preference files or `DIRECTORY:SPLIT` of a prepared data set, relative to the configuration's `root`;
    several are joined by "+".

    Attributes:
        name: What its sets are called in tables, and no other environment. A set that several environments share goes
            by the name of its file or split.
        train: Training set; None makes a test set that no model is trained for (a neutral control, say).
        test: Test set.
        validation: Validation set; None holds out a part of `train`.
    """

    name: str
    train: str | None
    test: str
    validation: str | None = None


@dataclasses.dataclass(frozen=True)
class MatrixConfig:
    """Objective x environment x seed: the cross-distribution matrix.

    Attributes:
        model: Checkpoint folder, in InternVL's own layout or in that of transformers' InternVLForConditionalGeneration;
            None takes the tiny model in the package.
        root: Folder that the environments' paths are relative to.
        image_root: Folder that image paths are relative to; None takes the folder of the file that names them.
        environments: Preference distributions to train and test on.
        objectives: Objectives to compare, by their names in docs/objectives.md. text_only costs no run beside
            shortcut_aware: it is its proxy, which shares one global-norm clip with the primary: text-only training up
            to clipping.
        modifiers: What each of them is given besides, as docs/objectives.md has it: centring:weight=0.1, for one. Runs
            that come before an objective's own are not, nor the proxy by one for the branch that scores.
        seeds: Runs per cell. More of them can be added to a finished matrix later.
        jobs: Processes that share the runs, on CPU.
        on: test uses the test sets; validation what was held out of the training sets, for making choices.
        out: Run directory. A matrix that was interrupted goes on where it stopped.
        train: Settings of every run, without objective and eval_every: `objectives` says what is compared, and each
            run is evaluated at its end. Seeds are counted from this one's.
        title: Heading of the report.
    """

    model: Path | None = None
    root: Path = Path(".")
    image_root: Path | None = None
    environments: tuple[Environment, ...] = ()
    objectives: tuple[str, ...] = ("text_only", "standard", "shortcut_aware")
    modifiers: tuple[str, ...] = ()
    seeds: int = 1
    jobs: int = 1
    on: Literal["test", "validation"] = "test"
    out: Path = Path("runs/matrix")
    train: TrainConfig = TrainConfig()
    title: str = "Cross-distribution matrix"

    def __post_init__(self) -> None:
        _check(self, "at least 1", seeds=self.seeds >= 1, jobs=self.jobs >= 1)
        names = [environment.name for environment in self.environments]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} environments are called {name!r}: give each a name of its own")
            if "/" in name:
                raise ValueError(f"environment {name!r}: its name is part of folder names, and cannot hold '/'")
        if not self.objectives:
            raise ValueError("MatrixConfig.objectives is empty; name at least one")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"MatrixConfig.objectives names one twice: {', '.join(self.objectives)}")
        if self.train.objective != TrainConfig.objective:
            raise ValueError("MatrixConfig.train.objective is not read; MatrixConfig.objectives says what is compared")
        if self.train.eval_every is not None:
            raise ValueError("MatrixConfig.train.eval_every is not read; each run is evaluated at its end")


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """The shapes world that an ablation renders, where it names no environments of its own.

    Attributes:
        comparisons: Training comparisons of each environment; its test set has an eighth of them.
        cue_agreement: How often the text cue agrees with the label.
        label_noise: How often the label goes against the image.
        image_noise: Standard deviation of the pictures' noise, of 255.
        left_out: "long", "hedged" or "short": train on the two others together, and test on this one too. None trains
            on each of the three.
    """

    comparisons: int = 8192
    cue_agreement: float = 0.9
    label_noise: float = 0.1
    image_noise: float = 4.0
    left_out: Literal["long", "hedged", "short"] | None = None

    def __post_init__(self) -> None:
        _check(self, "at least 0", image_noise=self.image_noise >= 0)
        _check(self, "at least 8: a test set has an eighth of them", comparisons=self.comparisons >= 8)
        rates = {"cue_agreement": self.cue_agreement, "label_noise": self.label_noise}
        _check(self, "from 0 to 1", **{name: 0 <= rate <= 1 for name, rate in rates.items()})


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """A grid of settings, with a cross-distribution matrix (objective x environment x seed) at each of its points.

    Attributes:
        matrix: Objectives, environments, seeds, and the settings of every run. Each point of the grid is a folder in
            its `out`; what is finished there is not run again.
        shapes: The world to render where `matrix` names no environments.
        grid: FIELD=VALUE,VALUE,... for each axis, a field of this configuration by its path: shapes.label_noise=0,0.1
            or matrix.train.proxy_input=absent,blank. Items of a list are joined by a plus, and () is an empty one:
            matrix.train.freeze=(),vision,vision+projector. Without an axis there is a single point.
        resamples: Of the bootstrap. The smallest p-value is 2 / (resamples + 1), before Holm's correction.
    """

    matrix: MatrixConfig = MatrixConfig(out=Path("runs/ablate"))
    shapes: ShapesConfig = ShapesConfig()
    grid: tuple[str, ...] = ()
    resamples: int = 10000

    def __post_init__(self) -> None:
        _check(self, "at least 100", resamples=self.resamples >= 100)


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values, for `config.json` and for comparing two runs."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
