"""Group -> arrays: the one tokenisation and image preprocessing of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmrm_jax.config import BranchInput
from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.data.buckets import GroupShape
from mmrm_jax.data.folder import read_object, read_optional, write_object
from mmrm_jax.data.images import Preprocessing, image_size, load_image, tile_count, tile_image
from mmrm_jax.data.templates import TEMPLATES, Template, find_template
from mmrm_jax.data.text import ChatTokenizer, GroupTokens, encode_texts
from mmrm_jax.types import Group

# What `Processor.save` writes; where a folder has it, it is all that counts beside the tokenizer's files.
SAVED = "mmrm_processor.json"
DEFAULT_MAX_LENGTH = 4096


# What is done to an image between decoding and tiling.
Change = Callable[[Image.Image], Image.Image]


def unchanged(image: Image.Image) -> Image.Image:
    """The image itself."""
    return image


@dataclasses.dataclass(frozen=True)
class Processor:
    """Everything that turns a group into model input. Picklable, so data workers can have one each."""

    chat: ChatTokenizer
    preprocessing: Preprocessing
    max_length: int

    @classmethod
    def from_pretrained(
        cls,
        path: Path,
        visual_tokens_per_tile: int,
        *,
        max_length: int | None = None,
        max_tiles: int | None = None,
    ) -> Processor:
        """Read the template, the tokenizer and the preprocessing of images of a checkpoint folder.

        They come from `mmrm_processor.json` where `save` wrote one, else from the files of the InternVL chat layout or
        of the transformers-native one; `max_length` (4096 where nothing says otherwise) and `max_tiles` override what
        is read. Raises ValueError naming the file and field that is missing or not supported.
        """
        saved = read_optional(path / SAVED)
        if saved:
            template, preprocessing, length = _read_saved(path / SAVED, saved, visual_tokens_per_tile)
        else:
            template, length = find_template(path), DEFAULT_MAX_LENGTH
            preprocessing = read_preprocessing(path, visual_tokens_per_tile)
        if max_tiles is not None:
            preprocessing = dataclasses.replace(preprocessing, max_tiles=max_tiles)
        chat = ChatTokenizer.from_pretrained(path, visual_tokens_per_tile, template)
        return cls(chat, preprocessing, max_length if max_length is not None else length)

    def save(self, path: Path) -> None:
        """Write the files of the tokenizer and `mmrm_processor.json`: `from_pretrained` reads the same processor."""
        self.chat.save(path)
        saved = {
            "template": self.chat.template.name,
            "visual_tokens_per_tile": self.chat.visual_tokens_per_tile,
            "max_length": self.max_length,
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }
        write_object(path / SAVED, saved)

    def encode(
        self,
        group: Group,
        index: int,
        views: dict[str, BranchInput],
        change: Change = unchanged,
        features: Sequence[np.ndarray] | None = None,
    ) -> EncodedGroup:
        """Tokens and tiles of a group for the branches in `views`; `change` is what is done to its images first.

        Where there are `features` of the images, [T, V, I] each, they stand in place of tiles, and no image is read; so
        do tiles that were made before.
        Raises ImageError or TextError for a group that cannot be used.
        """
        shown = features
        if shown is None:
            shown = [self.tiles(image, change) for image in group.images] if _looks(views) else []
        text = self._texts(group, [len(tiles) for tiles in shown], views)
        return EncodedGroup(
            index, text.prefixes, text.responses, joined(shown), group.comparisons, opening=text.opening
        )

    def _texts(self, group: Group, tiles: Sequence[int], views: dict[str, BranchInput]) -> GroupTokens:
        g = group
        tiles = tiles or [1] * len(g.images)  # where no branch looks at them: how many places there are
        return encode_texts(self.chat, g.prompt, g.responses, tiles, views, self.max_length, g.caption, g.history)

    def tiles(self, image: Path | bytes, change: Change = unchanged) -> UInt8[np.ndarray, "T S S 3"]:
        """The tiles of an image after `change`; raises ImageError where it cannot be read."""
        return tile_image(change(load_image(image)), self.preprocessing)

    def measure(self, group: Group, views: dict[str, BranchInput]) -> GroupShape:
        """The padded sizes a group needs, from its text and image header alone; raises as `encode` does."""
        images = group.images if _looks(views) else ()
        counts: list[int] = [tile_count(*image_size(image), self.preprocessing) for image in images]
        text = self._texts(group, counts, views)
        return GroupShape(
            prefixes={b: len(c.tokens) for b, c in text.prefixes.items()},
            responses=tuple(map(len, text.responses)),
            tiles=sum(counts),
            comparisons=len(group.comparisons),
        )


def joined(tiles: Sequence[np.ndarray]) -> np.ndarray | None:
    """The tiles (or features) of all images of a group, one after another; None where it has no image."""
    if not tiles:
        return None
    return tiles[0] if len(tiles) == 1 else np.concatenate(tiles)


def _looks(views: dict[str, BranchInput]) -> bool:
    """Whether any branch sees the image."""
    return any(v in ("multimodal", "image_only") for v in views.values())


def read_preprocessing(path: Path, visual_tokens_per_tile: int) -> Preprocessing:
    """How a checkpoint of either layout prepares images.

    InternVL chat layout: size and tiling from `config.json`, mean and std from `preprocessor_config.json`, where there
    is one. Transformers-native layout: all from `preprocessor_config.json`, or `image_processor` in
    `processor_config.json`; its `crop_to_patches` is not read, since InternVL's processor cuts images into tiles
    whatever that says. Raises ValueError naming the file and field that cannot be used.
    """
    file = path / "config.json"
    config = read_object(file)
    if "text_config" in config:
        return _native_preprocessing(path, visual_tokens_per_tile)
    normalisation = _normalisation(path / "preprocessor_config.json", read_optional(path / "preprocessor_config.json"))
    if config.get("pad2square"):
        raise ValueError(f"{file}: pad2square is not supported; set it to false")
    try:
        return Preprocessing(
            image_size=config.get("force_image_size") or config["vision_config"]["image_size"],
            min_tiles=config.get("min_dynamic_patch", 1),
            max_tiles=config.get("max_dynamic_patch", 6),
            use_thumbnail=config.get("use_thumbnail", False),  # these two as InternVLChatConfig has them
            dynamic=config.get("dynamic_image_size", False),
            **normalisation,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: how images are prepared cannot be read: {error!r}") from error


# Settings of transformers' image processor whose other values are not computed here; 3 is bicubic.
_NATIVE_REQUIRED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def _native_preprocessing(path: Path, visual_tokens_per_tile: int) -> Preprocessing:
    file = path / "processor_config.json"
    processor = read_optional(file)
    expected = processor.get("image_seq_length", visual_tokens_per_tile)
    if expected != visual_tokens_per_tile:
        raise ValueError(f"{file}: image_seq_length is {expected}, but a tile becomes {visual_tokens_per_tile} tokens")
    image = processor.get("image_processor")
    if image is None:
        file = path / "preprocessor_config.json"
        image = read_object(file)
    try:
        for name, supported in _NATIVE_REQUIRED.items():
            given = image.get(name)
            if given is not None and given != supported:
                raise ValueError(f"{name} is {given!r}; supported: {supported!r}")
        normalisation = _normalisation(file, {name: image[name] for name in ("image_mean", "image_std")})
        height, width = image["size"]["height"], image["size"]["width"]
        if height != width:
            raise ValueError(f"size is {height} x {width}, but tiles must be square")
        return Preprocessing(
            image_size=height,
            min_tiles=image.get("min_patches", 1),
            max_tiles=image.get("max_patches", 12),
            **normalisation,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: how images are prepared cannot be read: {error!r}") from error


def _normalisation(file: Path, image: Mapping[str, Any]) -> dict[str, Any]:
    """`image_mean` and `image_std`, as far as the file has them."""
    given = {ours: image.get(name) for name, ours in (("image_mean", "mean"), ("image_std", "std"))}
    found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    try:
        checked = Preprocessing(**found)
    except ValueError as error:
        raise ValueError(f"{file}: image_mean or image_std cannot be used: {error}") from error
    return {name: tuple(map(float, getattr(checked, name))) for name in found}


def _read_saved(
    file: Path, saved: Mapping[str, Any], visual_tokens_per_tile: int
) -> tuple[Template, Preprocessing, int]:
    """(template, preprocessing, max_length) that `Processor.save` wrote."""
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["preprocessing"].items()}
        template, preprocessing = TEMPLATES[saved["template"]], Preprocessing(**fields)
        slots, length = saved["visual_tokens_per_tile"], saved["max_length"]
        if type(length) is not int or length < 1:
            raise ValueError(f"max_length is {length!r}; it must be a positive integer")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}") from error
    if slots != visual_tokens_per_tile:
        raise ValueError(f"{file}: visual_tokens_per_tile is {slots}, but the model has {visual_tokens_per_tile}")
    return template, preprocessing, length
