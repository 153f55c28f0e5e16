"""Batches as shapes alone: what the train step is compiled for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mmrm_jax.config import BranchInput, ModelConfig
from mmrm_jax.types import Batch, Comparisons, Prefix, Responses


@dataclasses.dataclass(frozen=True)
class DataShape:
    """The sizes that every group of a batch is padded to. The defaults are the largest the paper's recipe allows.

    Attributes:
        tiles: Image tiles, thumbnail included.
        prompt: Tokens of the shared prefix beside the visual ones.
        response: Tokens of a response.
        responses: Responses of a group; two of them make a preference pair.
        comparisons: Comparisons of a group.
    """

    tiles: int = 7
    prompt: int = 256
    response: int = 2048
    responses: int = 2
    comparisons: int = 1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"DataShape.{name} is {value}; it must be at least 1")

    def tiles_of(self, view: BranchInput) -> int:
        """Image tiles that a branch sees."""
        return {"absent": 0, "caption": 0, "blank": 1}.get(view, self.tiles)

    def prefix_of(self, view: BranchInput, model: ModelConfig) -> int:
        """P, the tokens of a branch's prefix."""
        return self.prompt + self.tiles_of(view) * model.visual_tokens_per_tile

    def tokens(self, view: BranchInput, model: ModelConfig) -> int:
        """Tokens of a group that run through a branch's decoder."""
        return self.prefix_of(view, model) + self.responses * self.response


def abstract_batch(
    shape: DataShape,
    model: ModelConfig,
    views: dict[str, BranchInput],
    *,
    groups: int,
    micro_batches: int | None,
    features: str | None = None,
) -> Batch:
    """A batch of `groups` groups as shapes and dtypes, in `micro_batches` parts; None leaves out their axis.

    `features` is the dtype of the tower's features where they stand in place of pixels.
    """
    lead = () if micro_batches is None else (micro_batches,)
    size, side = groups // (micro_batches or 1), model.vision.image_size

    def array(*sizes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *sizes), dtype)

    prefixes = {}
    for branch, view in views.items():
        length, tiles = shape.prefix_of(view, model), shape.tiles_of(view)
        owners = 1 if view == "blank" else size
        image: dict[str, jax.ShapeDtypeStruct | None] = {"pixels": None}
        if tiles and features is None:
            image["pixels"] = array(owners, tiles, side, side, 3, dtype=jnp.uint8)
        elif tiles:
            sizes = (model.visual_tokens_per_tile, int(model.vision.width / model.downsample_ratio**2))
            image["features"] = array(owners, tiles, *sizes, dtype=jnp.dtype(features))
        prefixes[branch] = Prefix(array(size, length), array(size), array(size, length), **image)  # type: ignore[arg-type]
    count = size * shape.comparisons
    flags = array(count, dtype=jnp.bool_)
    comparisons = Comparisons(array(count, 2), array(count, dtype=jnp.float32), flags, flags)  # type: ignore[arg-type]
    rows = array(size, shape.responses, shape.response)
    responses = Responses(rows, rows, array(size, shape.responses), array(size))  # type: ignore[arg-type]
    return Batch(prefixes, responses, comparisons, array(size))  # type: ignore[arg-type]
