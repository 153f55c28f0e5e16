"""Group -> arrays: the one tokenisation and image preprocessing of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from mmrm_jax.config import BranchInput
from mmrm_jax.data.batching import EncodedGroup, GroupShape
from mmrm_jax.data.images import Preprocessing, image_size, load_image, tile_count, tile_image
from mmrm_jax.data.text import ChatTokenizer, encode_texts
from mmrm_jax.types import Group


@dataclasses.dataclass(frozen=True)
class Processor:
    """Everything that turns a group into model input. Picklable, so data workers can have one each."""

    chat: ChatTokenizer
    preprocessing: Preprocessing
    max_length: int

    @classmethod
    def from_pretrained(
        cls, path: Path, visual_tokens_per_tile: int, *, max_length: int = 4096, max_tiles: int | None = None
    ) -> Processor:
        """Read the template, tokenizer and tiling of an InternVL checkpoint folder."""
        config = json.loads((path / "config.json").read_text())
        preprocessing = Preprocessing(
            image_size=config.get("force_image_size") or config["vision_config"]["image_size"],
            min_tiles=config.get("min_dynamic_patch", 1),
            max_tiles=max_tiles if max_tiles is not None else config.get("max_dynamic_patch", 6),
            use_thumbnail=config.get("use_thumbnail", True),
            dynamic=config.get("dynamic_image_size", True),
        )
        return cls(ChatTokenizer.from_pretrained(path, visual_tokens_per_tile), preprocessing, max_length)

    def encode(self, group: Group, index: int, views: dict[str, BranchInput]) -> EncodedGroup:
        """Tokens and tiles of a group for the branches in `views`.

        Raises ImageError or TextError for a group that cannot be used.
        """
        tiles = None
        count = 0
        if group.image is not None and _looks(views):
            tiles = tile_image(load_image(group.image), self.preprocessing)
            count = len(tiles)
        text = encode_texts(self.chat, group.prompt, group.responses, count, views, self.max_length)
        return EncodedGroup(index, text.prefixes, text.responses, tiles, group.comparisons)

    def measure(self, group: Group, views: dict[str, BranchInput]) -> GroupShape:
        """The padded sizes a group needs, from its text and image header alone; raises as `encode` does."""
        count = 0
        if group.image is not None and _looks(views):
            count = tile_count(*image_size(group.image), self.preprocessing)
        text = encode_texts(self.chat, group.prompt, group.responses, count, views, self.max_length)
        return GroupShape(
            prefixes={b: len(c.tokens) for b, c in text.prefixes.items()},
            response=max(len(r) for r in text.responses),
            responses=len(group.responses),
            tiles=count,
            comparisons=len(group.comparisons),
        )


def _looks(views: dict[str, BranchInput]) -> bool:
    """Whether any branch sees the image."""
    return any(v in ("multimodal", "image_only") for v in views.values())
