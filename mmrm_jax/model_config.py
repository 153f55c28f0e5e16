"""What a checkpoint says of its model: frozen dataclasses, read from its `config.json`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """InternViT. `mean` and `std` normalise RGB values in 0..1. `remat` is `TrainConfig`'s: no checkpoint says it.

    `position_image_size` is the image size that the position table was made for, where that is not `image_size`: the
    table keeps its size, and the tower resizes it. `drop_path_rate` is the last layer's rate of stochastic depth in
    training; it grows linearly from 0 in the first layer.
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1024
    mlp_width: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    position_image_size: int | None = None
    drop_path_rate: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Position interpolation: positions are divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class DynamicRope:
    """Dynamic NTK: the base grows with the length of a conversation that is longer than `max_length`."""

    factor: float
    max_length: int


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_factor: float
    high_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Phi-3: a factor per frequency, `long_factors` for conversations longer than `original_length`.

    Cosines and sines are multiplied by `scale`, which "su" (also called "longrope") and "yarn" compute differently.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    max_length: int
    kind: Literal["su", "yarn"] = "su"

    @property
    def scale(self) -> float:
        """sqrt(1 + ln(s) / ln(original_length)) for "su", 1 + ln(s) / 10 for "yarn"; s is by how much it is longer."""
        longer = self.max_length / self.original_length
        if longer <= 1:
            return 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(longer) + 1.0
        return math.sqrt(1 + math.log(longer) / math.log(self.original_length))


RopeScaling = LinearRope | DynamicRope | Llama3Rope | LongRope

DecoderFamily = Literal["internlm2", "qwen2", "qwen3", "llama", "phi3"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder. `family` names its tensors in checkpoints; the other fields say what it computes.

    But for `remat`, which is `TrainConfig`'s.
    """

    family: DecoderFamily = "qwen2"
    vocab_size: int = 151655
    width: int = 896
    mlp_width: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    head_width: int = 64
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    o_bias: bool = False
    qk_norm: bool = False
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """InternVL: vision tower, pixel shuffle, projector, decoder.

    `downsample_ratio` 0.5 merges 2x2 patches into one visual token. `pixel_shuffle` "v1" keeps the transposed
    layout of the first release. `select_layer` is the index of the vision hidden state that is used, as in the
    checkpoint's configuration (-1 is the last layer's output).
    """

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    downsample_ratio: float = 0.5
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    select_layer: int = -1

    @property
    def visual_tokens_per_tile(self) -> int:
        """V, the number of visual tokens one tile becomes."""
        side = self.vision.image_size // self.vision.patch_size
        return int(side * self.downsample_ratio) ** 2
