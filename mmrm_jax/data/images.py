"""Encoded images to uint8 tiles: safe decoding and InternVL's dynamic tiling.

The tiles equal those of the authors' preprocessing byte for byte. Normalisation is left to the model: a batch travels
as uint8.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from mmrm_jax.data.folder import why

MAX_PIXELS = 50_000_000

# The largest settings that make sense; every image's time and memory grow with them.
MAX_IMAGE_SIZE, MAX_TILES = 4096, 256

# Only formats that are pictures and decode in-process: Pillow's EPS reader, for one, starts Ghostscript on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# What Pillow's decoders raise on damaged data.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error)


class ImageError(ValueError):
    """An image that cannot be used: missing, not an image, damaged, empty or too large."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes square tiles of `image_size` pixels.

    With `dynamic` the image is cut into the grid of `min_tiles` to `max_tiles` tiles whose aspect ratio is closest to
    its own, and `use_thumbnail` appends the whole image as a last tile where the grid has more than one. Without
    `dynamic` the whole image is the one tile. The model normalises RGB values in 0..1 with `mean` and `std`, by default
    ImageNet's, as InternVL was trained. Raises ValueError naming the field whose type or value cannot be.
    """

    image_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 6
    use_thumbnail: bool = True
    dynamic: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name, high in (("image_size", MAX_IMAGE_SIZE), ("min_tiles", MAX_TILES), ("max_tiles", MAX_TILES)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= high:
                raise ValueError(f"Preprocessing.{name} is {value!r}; it must be an integer from 1 to {high}")
        for name in ("use_thumbnail", "dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Preprocessing.{name} is {getattr(self, name)!r}; it must be true or false")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3 or not all(map(_is_number, value)):
                raise ValueError(f"Preprocessing.{name} is {value!r}; it must be three numbers")
        if min(self.std) <= 0:
            raise ValueError(f"Preprocessing.std is {self.std}; it must be three positive numbers")
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"Preprocessing needs min_tiles <= max_tiles, not {self.min_tiles} and {self.max_tiles}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def image_size(image: Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels, read from the header alone.

    Raises ImageError where the file is missing or no image, or has no pixels or more than `max_pixels`.
    """
    with _opened(image, max_pixels) as opened:
        return opened.size


def load_image(image: Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The fully decoded RGB image; of an animation, the first frame.

    Transparency is dropped and EXIF orientation is not applied, as in the authors' preprocessing. Raises ImageError
    where the file is missing, no image, damaged or cut short, has no pixels or more than `max_pixels`, or pixels that
    are not of 8 bits; the size is checked before anything is decoded.
    """
    with _opened(image, max_pixels) as opened:
        return as_rgb(opened, _name(image))


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB, transparency dropped. Raises ImageError for 16 bits and more, all of which Pillow would cut off at 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ImageError(f"{name} has pixels of more than 8 bits (mode {image.mode}); save it with 8 bits a channel")
    return image.convert("RGB")


def _name(image: Path | bytes) -> str:
    return f"image of {len(image)} bytes" if isinstance(image, bytes) else f"image {image}"


@contextlib.contextmanager
def _opened(image: Path | bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image, check its size, and turn whatever goes wrong until the end of the block into ImageError."""
    name = _name(image)
    try:
        with warnings.catch_warnings():
            # Our own limit stands in for Pillow's bomb warning; damaged metadata is no matter where the pixels decode.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
                _check_size(opened.size, max_pixels, name)
                yield opened
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {error}") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a directory; name the file in it") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is none of {', '.join(FORMATS)}, or its header is damaged") from error
    except DECODE_ERRORS as error:
        raise ImageError(f"{name} cannot be decoded: {why(error)}") from error


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels: its size is {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is too large: {width} x {height} pixels, more than the limit of {max_pixels:,} pixels"
        )


def tile_grid(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(columns, rows) of the tile grid for an image of `width` x `height` pixels, without the thumbnail.

    The grid whose aspect ratio is closest to the image's wins. Between equally close grids (1 x 1 and 2 x 2, say) the
    larger one wins where the image has more than half of its pixels.
    """
    if not preprocessing.dynamic:
        return 1, 1
    aspect, area, tile_area = width / height, width * height, preprocessing.image_size**2
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(preprocessing.min_tiles, preprocessing.max_tiles):
        distance = abs(aspect - columns / rows)
        large_enough = area > 0.5 * tile_area * columns * rows
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (columns, rows), distance
    return best


def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """All (columns, rows) of `min_tiles` to `max_tiles` tiles, by number of tiles."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _affordable_grid(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """`tile_grid`, where what `_resize` makes on the way, of the grid's width and the image's height, is not too large.

    Raises ImageError elsewhere: a file of a few bytes may hold a column of millions of pixels.
    """
    columns, rows = tile_grid(width, height, preprocessing)
    wide, tall = columns * preprocessing.image_size, max(height, rows * preprocessing.image_size)
    if wide * tall > MAX_PIXELS:
        raise ImageError(
            f"the image of {width} x {height} pixels cannot be cut into {columns} x {rows} tiles: resizing it takes "
            f"{wide} x {tall} pixels, more than the limit of {MAX_PIXELS:,}; crop it, or lower max_tiles"
        )
    return columns, rows


def tile_count(width: int, height: int, preprocessing: Preprocessing) -> int:
    """How many tiles `tile_image` makes of an image of this size, thumbnail included; raises ImageError as it does."""
    columns, rows = _affordable_grid(width, height, preprocessing)
    tiles = columns * rows
    return tiles + 1 if preprocessing.use_thumbnail and tiles > 1 else tiles


def tile_image(image: Image.Image, preprocessing: Preprocessing) -> UInt8[np.ndarray, "T S S 3"]:
    """Cut an RGB image into its tiles, row by row from the top left, the thumbnail last; uint8, S = `image_size`.

    Raises ImageError where the image is so tall and narrow that resizing it would take more than `MAX_PIXELS` pixels.
    """
    side = preprocessing.image_size
    columns, rows = _affordable_grid(image.width, image.height, preprocessing)
    resized = np.asarray(_resize(image, side * columns, side * rows))
    tiles = resized.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, side, side, 3)
    if preprocessing.use_thumbnail and columns * rows > 1:
        thumbnail = np.asarray(_resize(image, side, side))
        tiles = np.concatenate([tiles, thumbnail[None]])
    return np.ascontiguousarray(tiles)


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, the rows first and then the columns.

    Pillow up to 12 always does, and so did the authors' preprocessing; from 13 on it takes the columns of a tall image
    first, and since each pass rounds to uint8, the result differs by up to 24 grey levels.
    """
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def blank_tile(image_size: int) -> UInt8[np.ndarray, "1 S S 3"]:
    """One white tile: the proxy's `blank` input, which is what a white image of any size is resized to."""
    return np.full((1, image_size, image_size, 3), 255, np.uint8)
