"""Decoding that never surprises, and tiles equal to the authors' preprocessing byte for byte."""

import hashlib
import io
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
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

every_set = pytest.mark.parametrize(
    "folder", fixtures("preproc", "expected.json", "grid_table.json", "tiles_uint8.npz", "pixel_values_f32.npz")
)


def pictures(folder: Path) -> dict[str, dict]:
    """What is expected of each picture of a set, by its name; other entries begin with an underscore."""
    entries = json.loads((folder / "expected.json").read_text())
    return {name: entry for name, entry in entries.items() if not name.startswith("_")}


# mean and std of the settings that normalise otherwise
NORMALISATION = {
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def case_preprocessing(case: str) -> Preprocessing | None:
    """`S56_max6_thumb1`, `S56_min4_max6_thumb1`, `S56_nodynamic` or `S56_clip` as settings.

    None for padding to a square, which is refused when a checkpoint asks for it.
    """
    size, *rest = case.split("_")
    side = int(size.removeprefix("S"))
    if rest == ["pad2square"]:
        return None
    if rest[0] in ("nodynamic", *NORMALISATION):
        mean, std = NORMALISATION.get(rest[0], (Preprocessing.mean, Preprocessing.std))
        return Preprocessing(side, dynamic=False, mean=mean, std=std)
    options = {part.rstrip("0123456789"): int(part.lstrip("minaxthub")) for part in rest}
    return Preprocessing(side, options.get("min", 1), options["max"], bool(options["thumb"]))


def normalised(tiles: np.ndarray, p: Preprocessing) -> np.ndarray:
    """[T, 3, S, S] float32, with the operations that the model does on a batch."""
    values = (tiles.astype(np.float32) / np.float32(255) - np.float32(p.mean)) / np.float32(p.std)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


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


@every_set
def test_grids_equal_the_goldens(folder):
    for width, height, *grids in json.loads((folder / "grid_table.json").read_text()):
        for max_tiles, grid in zip((1, 2, 4, 6, 12, 24), grids, strict=True):
            assert tile_grid(width, height, Preprocessing(448, 1, max_tiles)) == tuple(grid), (width, height, max_tiles)


@every_set
def test_tiles_equal_the_goldens(folder):
    """Every picture and setting, bit for bit, before and after normalisation, whatever Pillow is installed."""
    checked = 0
    for name, expected in pictures(folder).items():
        image = load_image(folder / expected["file"])
        assert [*image.size] == expected["size"] == [*image_size(folder / expected["file"])]
        assert sha256(np.asarray(image)) == expected["rgb_sha256"]
        for case, want in expected["cases"].items():
            p = case_preprocessing(case)
            if p is None:
                continue
            tiles = tile_image(image, p)
            side = p.image_size
            assert tiles.shape == (want.get("n_tiles", 1), side, side, 3) and tiles.dtype == np.uint8, (name, case)
            assert tile_count(*image.size, p) == len(tiles)
            if "grid_wh" in want:
                assert tile_grid(*image.size, p) == tuple(want["grid_wh"])
            if "uint8_sha256" in want:
                assert sha256(tiles) == want["uint8_sha256"], (name, case)
            if "float32_sha256" in want:
                assert sha256(normalised(tiles, p)) == want["float32_sha256"], (name, case)
            checked += 1
    assert checked > 0


@every_set
def test_arrays_equal_the_goldens(folder):
    """What the checksums stand for, so that a difference can be seen."""
    for key, want in np.load(folder / "tiles_uint8.npz").items():
        name, case, _ = key.split(".")
        image = load_image(folder / "images" / f"{name}.png")
        tiles = tile_image(image, case_preprocessing(case))
        np.testing.assert_array_equal(tiles if want.ndim == 4 else tiles[0], want)
    for key, want in np.load(folder / "pixel_values_f32.npz").items():
        name, case, _ = key.split(".")
        p = case_preprocessing(case)
        np.testing.assert_array_equal(normalised(tile_image(load_image(folder / "images" / f"{name}.png"), p), p), want)


@every_set
def test_a_white_proxy_tile_equals_the_golden(folder):
    white = json.loads((folder / "expected.json").read_text())["_white_fake"]
    values = normalised(blank_tile(448), Preprocessing())
    np.testing.assert_array_equal(values[0, :, 0, 0], np.float32(white["values_per_channel"]))
    assert sha256(values) == white["float32_sha256"]


def test_tall_images_are_resized_as_wide_ones():
    """Rows before columns for both, in every Pillow: the tiles of an image are not those of its transpose, turned."""
    image = noise(7, 300)
    wide_first = image.resize((16, 300), Image.Resampling.BICUBIC).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(tile_image(image, Preprocessing(16, max_tiles=1))[0], np.asarray(wide_first))


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


def test_a_narrow_column_is_refused_before_it_is_widened():
    """1 x 400,000 pixels would take 448 x 400,000 on the way; the header alone says so."""
    p = Preprocessing(448)
    for make in (lambda: tile_count(1, 400_000, p), lambda: tile_image(Image.new("RGB", (1, 400_000)), p)):
        with pytest.raises(ImageError, match=r"1 x 400000 pixels cannot be cut .*448 x 400000 pixels, more than"):
            make()
    with pytest.raises(ImageError, match="limit"):
        tile_count(1, 400_000, Preprocessing(448, dynamic=False))
    with pytest.raises(ImageError, match="max_tiles"):  # the tiles themselves
        tile_count(9000, 9000, Preprocessing(4096, max_tiles=4))
    assert tile_count(400_000, 1, p) == 7 and tile_count(100, 100_000, p) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 448.0}, "image_size is 448.0"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"max_tiles": 10**9}, "max_tiles is 1000000000; it must be an integer from 1 to 256"),
        ({"max_tiles": True}, "max_tiles is True"),
        ({"min_tiles": "1"}, "min_tiles is '1'"),
        ({"min_tiles": 3, "max_tiles": 2}, "min_tiles <= max_tiles, not 3 and 2"),
        ({"dynamic": "false"}, "dynamic is 'false'; it must be true or false"),
        ({"use_thumbnail": 0}, "use_thumbnail is 0"),
        ({"mean": "abc"}, "mean is 'abc'; it must be three numbers"),
        ({"mean": ("0.5", 0.5, 0.5)}, "mean is "),
        ({"std": (1, 1, float("nan"))}, "std is "),
        ({"std": (1, 1)}, "std is "),
        ({"std": (1, 1, 0)}, "three positive numbers"),
    ],
)
def test_impossible_preprocessing_is_refused(settings, message):
    with pytest.raises(ValueError, match=rf"Preprocessing.*{message}"):
        Preprocessing(**settings)


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
    with pytest.raises(ImageError, match="is a directory; name the file in it"):
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
    for mode in ("1", "L", "LA", "P", "RGBA"):
        assert load_image(encoded(Image.new(mode, (3, 2)))).mode == "RGB"
    assert load_image(encoded(Image.new("CMYK", (3, 2)), "JPEG")).mode == "RGB"


@pytest.mark.parametrize(("mode", "form"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")])
def test_pixels_of_more_than_8_bits_are_refused_and_not_cut_off(mode, form):
    with pytest.raises(ImageError, match=r"image of \d+ bytes has pixels of more than 8 bits \(mode .*save it with 8"):
        load_image(encoded(Image.new(mode, (3, 2)), form))
