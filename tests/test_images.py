"""Decoding that never surprises, and tiles equal to the authors' preprocessing byte for byte."""

import hashlib
import io
import json
import random
import struct
import zlib

import numpy as np
import PIL
import pytest
from goldens import fixtures
from PIL import Image

from mmrm_jax.data.images import (
    ImageError,
    Preprocessing,
    blank_tile,
    image_size,
    load_image,
    tile_count,
    tile_grid,
    tile_image,
)

folders = pytest.mark.parametrize("folder", fixtures("preproc", "expected.json"))
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def one_bit_png(width: int, height: int) -> bytes:
    """A PNG header of any size with (almost) no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@folders
def test_grids_equal_the_goldens(folder):
    for width, height, *grids in json.loads((folder / "grid_table.json").read_text()):
        for max_tiles, grid in zip((1, 2, 4, 6, 12, 24), grids, strict=True):
            assert tile_grid(width, height, Preprocessing(448, 1, max_tiles)) == tuple(grid), (width, height, max_tiles)


@folders
@pytest.mark.parametrize(
    "name", ["wide2x1", "tall1x2", "square", "tiny", "pano", "photo4x3", "strip", "rgba3x2", "grayL", "pal"]
)
def test_tiles_equal_the_goldens(folder, name):
    expected = json.loads((folder / "expected.json").read_text())[name]
    image = load_image(folder / expected["file"])
    assert [*image.size] == expected["size"] == [*image_size(folder / expected["file"])]
    assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest() == expected["rgb_sha256"]
    checked = 0
    for case, want in expected["cases"].items():
        if "uint8_sha256" not in want:
            continue
        size, most, thumbnail = (int(part.lstrip("Smaxthub")) for part in case.split("_"))
        preprocessing = Preprocessing(size, 1, most, bool(thumbnail))
        tiles = tile_image(image, preprocessing)
        assert tiles.shape == (want["n_tiles"], size, size, 3) and tiles.dtype == np.uint8
        assert tile_count(*image.size, preprocessing) == want["n_tiles"]
        assert tile_grid(*image.size, preprocessing) == tuple(want["grid_wh"])
        checksum = want.get("uint8_sha256_pillow13", want["uint8_sha256"]) if PILLOW_13 else want["uint8_sha256"]
        assert hashlib.sha256(tiles.tobytes()).hexdigest() == checksum, case
        checked += 1
    assert checked == 12


@folders
@pytest.mark.parametrize("name", ["wide2x1", "square", "pano", "photo4x3"])  # wide: the same in every Pillow
def test_min_tiles_and_static_equal_the_goldens_after_normalisation(folder, name):
    expected = json.loads((folder / "expected.json").read_text())[name]
    image = load_image(folder / expected["file"])
    for case, preprocessing in {
        "S56_min4_max6_thumb1": Preprocessing(56, 4, 6),
        "S448_min4_max6_thumb1": Preprocessing(448, 4, 6),
        "S56_nodynamic": Preprocessing(56, dynamic=False),
    }.items():
        tiles = tile_image(image, preprocessing)
        want = expected["cases"][case]
        assert len(tiles) == want.get("n_tiles", 1) == tile_count(*image.size, preprocessing)
        normalised = (tiles.astype(np.float32) / np.float32(255) - MEAN) / STD
        assert abs(normalised.mean(dtype=np.float64) - want.get("mean", normalised.mean(dtype=np.float64))) < 1e-6
        channels_first = np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))
        assert hashlib.sha256(channels_first.tobytes()).hexdigest() == want["float32_sha256"], case


@folders
def test_tile_order_equals_the_golden_arrays(folder):
    arrays = np.load(folder / "tiles_uint8.npz")
    for name in ("wide2x1", "square", "pano", "photo4x3", "rgba3x2"):
        tiles = tile_image(load_image(folder / "images" / f"{name}.png"), Preprocessing(56))
        np.testing.assert_array_equal(tiles, arrays[f"{name}.S56_max6_thumb1.uint8"])


def test_grid_by_hand():
    p = Preprocessing(image_size=100, max_tiles=6)
    assert tile_grid(600, 100, p) == (6, 1)
    assert tile_grid(100, 300, p) == (1, 3)
    assert tile_grid(10_000, 1, p) == (6, 1)
    # Square: 2 x 2 only where the image has more than half of its 40,000 pixels.
    assert tile_grid(141, 141, p) == (1, 1) and tile_grid(142, 142, p) == (2, 2)
    assert tile_count(142, 142, p) == 5
    assert tile_count(142, 142, Preprocessing(100, max_tiles=6, use_thumbnail=False)) == 4
    assert tile_count(600, 100, Preprocessing(100, dynamic=False)) == 1


def test_tiles_are_the_image_cut_row_by_row():
    """With an image exactly as large as its grid nothing is resized."""
    image = noise(24, 16)
    tiles = tile_image(image, Preprocessing(8, max_tiles=6))
    pixels = np.asarray(image)
    assert tiles.shape == (7, 8, 8, 3)
    for index in range(6):
        row, column = divmod(index, 3)
        np.testing.assert_array_equal(tiles[index], pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8])
    np.testing.assert_array_equal(tiles[6], np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)))


def test_tile_count_always_equals_the_tiles_made():
    rng = random.Random(0)
    for _ in range(60):
        least = rng.randint(1, 4)
        p = Preprocessing(rng.choice([4, 8]), least, rng.randint(least, 9), rng.random() < 0.5, rng.random() < 0.8)
        size = rng.randint(1, 90), rng.randint(1, 90)
        tiles = tile_image(Image.new("RGB", size), p)
        assert len(tiles) == tile_count(*size, p)
        assert tiles.flags.c_contiguous


def test_blank_tile_is_a_white_image():
    np.testing.assert_array_equal(
        blank_tile(56), tile_image(Image.new("RGB", (224, 224), "white"), Preprocessing(56, max_tiles=1))
    )


@pytest.mark.parametrize("arguments", [(0,), (448, 0), (448, 3, 2)])
def test_impossible_preprocessing_is_refused(arguments):
    with pytest.raises(ValueError, match="Preprocessing"):
        Preprocessing(*arguments)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("side", "count"), [(20_000, "400000000"), (10_000, "100,?000,?000|10000 x 10000"), (7_100, "7100 x 7100")]
)
def test_bombs_are_refused_before_decoding(tmp_path, side, count):
    path = tmp_path / "bomb.png"
    path.write_bytes(one_bit_png(side, side))
    for read in (image_size, load_image):
        with pytest.raises(ImageError, match=rf"bomb.png is too large: .*({count})"):
            read(path)
    with pytest.raises(ImageError, match="100 x 50 pixels, more than the limit of 4,999 pixels"):
        load_image(encoded(Image.new("1", (100, 50))), max_pixels=4_999)
    assert load_image(encoded(Image.new("1", (100, 50))), max_pixels=5_000).size == (100, 50)


def test_unusable_images_name_the_reason(tmp_path):
    jpeg = encoded(noise(64, 64), "JPEG")
    with pytest.raises(ImageError, match="nowhere.png does not exist"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be decoded: .*truncated"):
        load_image(jpeg[: len(jpeg) // 2])
    assert image_size(jpeg[: len(jpeg) // 2]) == (64, 64)  # the header is whole
    for data in (b"", b"not an image", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(ImageError, match=f"image of {len(data)} bytes"):
            load_image(data)
    for data in (one_bit_png(0, 5), one_bit_png(5, 0), one_bit_png(0, 0)):
        with pytest.raises(ImageError):
            image_size(data)


def test_random_damage_gives_an_image_or_an_image_error():
    rng = random.Random(1)
    outcomes = {"image": 0, "error": 0}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"):
        whole = encoded(noise(20, 20), kind)
        for _ in range(60):
            data = bytearray(whole[: rng.randint(1, len(whole))] if rng.random() < 0.4 else whole)
            for _ in range(rng.randint(0, 6)):
                end = len(data) if rng.random() < 0.8 else min(40, len(data))  # the header more often than its share
                data[rng.randrange(end)] = rng.randrange(256)
            try:
                assert load_image(bytes(data), max_pixels=100_000).mode == "RGB"
                outcomes["image"] += 1
            except ImageError:
                outcomes["error"] += 1
    assert min(outcomes.values()) > 20


def test_exif_orientation_is_not_applied_and_every_mode_becomes_rgb():
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (30, 10)
    assert load_image(encoded(image, "MPO", save_all=True, append_images=[image])).size == (30, 10)  # as phones write
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        assert load_image(encoded(Image.new(mode, (3, 2)))).mode == "RGB"
    assert load_image(encoded(Image.new("CMYK", (3, 2)), "JPEG")).mode == "RGB"
