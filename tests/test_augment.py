"""Random changes of training images: of the same size, a function of seed and step alone, none in evaluation."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from mmrm_jax.config import Augmentation
from mmrm_jax.data.augment import augment
from mmrm_jax.data.images import Preprocessing
from mmrm_jax.data.pipeline import BatchPlan, ListPlan, MakeBatch, batches, buckets_for, index_source
from mmrm_jax.data.processor import Processor
from mmrm_jax.data.sources import MemorySource
from mmrm_jax.data.text import TEMPLATES, ChatTokenizer
from mmrm_jax.tiny.tokenizer import train_tokenizer
from mmrm_jax.types import Comparison, Group

VIEWS = {"primary": "multimodal", "proxy": "absent"}
CROPPED = Augmentation(crop=0.5, mirror=True)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


@pytest.fixture(scope="module", params=[False, True], ids=["read each time", "cached"])
def data(request):
    chat = ChatTokenizer(train_tokenizer(), TEMPLATES["chatml-plain"], 4)
    processor = Processor(chat, Preprocessing(image_size=16, max_tiles=2), max_length=200)
    groups = []
    for i in range(12):
        buffer = io.BytesIO()
        ramp(24 + 8 * (i % 4), 24).save(buffer, "PNG")
        image = None if i == 5 else buffer.getvalue()
        groups.append(Group(str(i), "what?", ("red", "green"), (Comparison(0, 1),), image, "e", "f.jsonl", i))
    return index_source(MemorySource(tuple(groups)), processor, VIEWS, cache=request.param)[0]


def shown(batch) -> dict[int, np.ndarray]:
    """Group -> its tiles as the primary sees them."""
    pixels = np.asarray(batch.prefixes["primary"].pixels)
    index = batch.group_index.ravel().tolist()
    return dict(zip(index, pixels.reshape(len(index), *pixels.shape[-4:]), strict=True))


def without_pixels(batch):
    primary = dataclasses.replace(batch.prefixes["primary"], pixels=None)
    return dataclasses.replace(batch, prefixes=batch.prefixes | {"primary": primary})


# ---- one image


@pytest.mark.parametrize("size", [(96, 96), (40, 100), (1, 7), (1, 1)])
def test_the_size_stays(size):
    for seed in range(20):
        assert augment(ramp(*size), CROPPED, np.random.default_rng(seed)).size == size


def test_without_settings_the_image_stays():
    image = ramp(30, 20)
    assert np.array_equal(augment(image, Augmentation(), np.random.default_rng(0)), image)


def test_a_crop_shows_a_part_of_the_size_that_is_asked_for():
    """The range of the ramps in a crop is the share of its sides; a share of area is drawn evenly."""
    shares, starts = [], []
    for seed in range(400):
        shown = np.asarray(augment(ramp(200, 200), Augmentation(crop=0.25), np.random.default_rng(seed)), float)
        sides = (shown[..., :2].max((0, 1)) - shown[..., :2].min((0, 1))) / 255
        assert sides[0] == pytest.approx(sides[1], abs=0.02)
        shares.append(sides[0] * sides[1])
        starts.append(shown[..., 0].min() / 255 / max(1e-6, 1 - sides[0]))
    assert 0.24 < min(shares) < 0.27
    assert 0.96 < max(shares) <= 1
    assert np.mean(shares) == pytest.approx(0.625, abs=0.03)
    assert np.mean(starts) == pytest.approx(0.5, abs=0.05)


def test_half_of_the_images_are_mirrored():
    mirrored = 0
    for seed in range(300):
        shown = np.asarray(augment(ramp(20, 10), Augmentation(mirror=True), np.random.default_rng(seed)), int)
        assert shown[0, 0, 1] < shown[-1, 0, 1]  # never upside down
        mirrored += shown[0, 0, 0] > shown[0, -1, 0]
    assert 120 < mirrored < 180


@pytest.mark.parametrize("crop", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_cannot_be(crop):
    with pytest.raises(ValueError, match="crop"):
        Augmentation(crop=crop)


# ---- the stream


def test_a_step_is_a_function_of_the_seed_and_its_number(data):
    plan = BatchPlan([1] * len(data), 4, 3, 9)
    make = MakeBatch(data, buckets_for([data], 1), 4, augmentation=CROPPED)
    whole = list(batches(plan, make.random, seed=3))
    for start, workers in ((0, 0), (4, 0), (9, 0), (2, 2)):
        rest = list(batches(plan, make.random, seed=3, start=start, workers=workers))
        assert len(rest) == 9 - start
        for ours, theirs in zip(rest, whole[start:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    other = list(batches(plan, make.random, seed=4))
    for ours, theirs in zip(whole, other, strict=True):
        assert all(i == 5 or not np.array_equal(tiles, shown(theirs)[i]) for i, tiles in shown(ours).items())


def test_every_image_is_changed_and_nothing_else_is(data):
    """Group 5 has no image. The same groups at another step are changed in another way."""
    plan = ListPlan(range(len(data)), 4)
    make = MakeBatch(data, buckets_for([data], 1), 4, augmentation=CROPPED)
    for ours, theirs in zip(batches(plan, make.random, seed=1), batches(plan, make), strict=True):
        for i, tiles in shown(ours).items():
            assert np.array_equal(tiles, shown(theirs)[i]) == (i == 5)
        jax.tree.map(np.testing.assert_array_equal, without_pixels(ours), without_pixels(theirs))


def test_processes_change_a_group_alike(data):
    buckets = buckets_for([data], 1)
    found = {}
    for share in range(2):
        make = MakeBatch(data, buckets, 8, share=share, shares=2, augmentation=CROPPED)
        found |= shown(make.random(np.arange(8), np.random.default_rng(0)))
    whole = MakeBatch(data, buckets, 8, augmentation=CROPPED).random(np.arange(8), np.random.default_rng(0))
    for i, tiles in shown(whole).items():
        assert np.array_equal(tiles, found[i])


def test_an_image_that_is_gone_is_reported(tmp_path):
    chat = ChatTokenizer(train_tokenizer(), TEMPLATES["chatml-plain"], 4)
    processor = Processor(chat, Preprocessing(image_size=16), max_length=200)
    file = tmp_path / "photo.png"
    ramp(24, 24).save(file)
    group = Group("0", "what?", ("red", "green"), (Comparison(0, 1),), file, "e", "f.jsonl", 7)
    data, _ = index_source(MemorySource((group,)), processor, VIEWS, cache=True)
    file.unlink()
    make = MakeBatch(data, buckets_for([data], 1), 1, quarantine=tmp_path / "bad.jsonl", augmentation=CROPPED)
    assert make.random(np.arange(1), np.random.default_rng(0)).group_index.ravel().tolist() == [-1]
    assert '"row": 7' in (tmp_path / "bad.jsonl").read_text()
