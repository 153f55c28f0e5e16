"""`mmrm_jax.load`: the rewards of `mmrm score`, whatever form an image has, in few shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import FAST, run, write_pairs
from PIL import Image

import mmrm_jax
from mmrm_jax.data.buckets import GroupShape
from mmrm_jax.data.images import ImageError
from mmrm_jax.data.ladder import Ladder, step_up
from mmrm_jax.data.text import TextError
from mmrm_jax.models.hf.weights import load_params
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.state import abstract_model

pytestmark = pytest.mark.usefixtures("one_device")

CLOSE = 1e-5


@pytest.fixture(scope="module")
def rm():
    return mmrm_jax.load(MODEL_DIR, draw_score=3, batch_size=8)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("image") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def test_rewards_are_those_of_the_command(rm, tmp_path, capsys):
    """Alone, and many requests of several shapes at once: the same, in order."""
    file = write_pairs(tmp_path, "rows", 5)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [(tmp_path / r["img_path"], r["prompt"], [r["chosen"], r["rejected"]]) for r in rows]
    asked[1:1] = [
        (None, "What is red? " * 9, ["A pear."]),
        ([asked[0][0], asked[1][0]], "Which one?", ["One.", "b " * 30]),
    ]
    scoring = [
        {
            "prompt": p,
            "responses": r,
            "images" if isinstance(i, list) else "img_path": i and json.loads(json.dumps(i, default=str)),
        }
        for i, p, r in asked
    ]
    data, out = tmp_path / "scoring.jsonl", tmp_path / "scores.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in scoring))
    assert run(capsys, "score", "--model", MODEL_DIR, "--draw-score", 3, "--data", data, "--out", out)[0] == 0
    want = np.array([json.loads(line)["score"] for line in out.read_text().splitlines()])
    many = rm.score_many(asked)
    assert [len(rewards) for rewards in many] == [2, 1, 2, 2, 2, 2, 2]
    assert all(rewards.dtype == np.float32 for rewards in many)
    np.testing.assert_allclose(np.concatenate(many), want, atol=CLOSE)
    assert np.ptp(want) > 0.1
    np.testing.assert_allclose(rm.score(*asked[2]), many[2], atol=CLOSE)


def test_an_image_may_have_any_form(rm, image):
    opened = Image.open(image)
    forms = [image, str(image), image.read_bytes(), opened, opened.convert("RGB"), [image]]
    rewards = np.stack([rm.score(form, "What is it?", ["A pear.", "Noise."]) for form in forms])
    assert np.array_equal(rewards, np.broadcast_to(rewards[0], rewards.shape))
    assert not np.allclose(rewards[0], rm.score(None, "What is it?", ["A pear.", "Noise."]), atol=1e-3)


def test_features_in_place_of_tiles_give_the_same(rm, image):
    tiles = rm.tiles(image)
    found = rm.features(tiles)
    assert found.shape[0] == len(tiles) and found.dtype == np.float32
    many = np.concatenate([tiles] * 5)  # padded to six
    np.testing.assert_allclose(rm.features(many)[-len(tiles) :], found, atol=CLOSE)
    responses = ["A pear.", "Noise, as one can see in the picture."]
    (group,) = rm.encode([found], "What is it?", responses)
    (rewards,) = rm.rewards([group])
    np.testing.assert_allclose(rewards, rm.score(image, "What is it?", responses), atol=CLOSE)
    two = rm.rewards(rm.encode([found, rm.features(tiles)], "<image> or <image>?", responses))[0]
    np.testing.assert_allclose(two, rm.score([image, image], "<image> or <image>?", responses), atol=CLOSE)


def test_many_responses_are_split_and_keep_their_order(rm, image):
    responses = [f"It is {i} of {i * i}." for i in range(70)]
    rewards = rm.score(image, "How many?", responses)
    assert rewards.shape == (70,)
    for i in (0, 63, 64, 69):
        np.testing.assert_allclose(rewards[i], rm.score(image, "How many?", [responses[i]])[0], atol=CLOSE)


@pytest.mark.parametrize(
    ("image", "prompt", "responses", "error", "reason"),
    [
        (None, "p", [], ValueError, "no responses"),
        (None, "p", ["a", " "], ValueError, r"empty response: 'responses\[1\]'"),
        (None, " ", ["a"], ValueError, "empty prompt"),
        (None, "p", ["\ud800"], ValueError, "surrogate"),
        (None, "p", "text", TypeError, "must be a list"),
        (None, "word " * 5000, ["a"], TextError, "over the budget"),
        ("no/such.png", "p", ["a"], ImageError, "does not exist"),
        (b"no image", "p", ["a"], ImageError, "none of PNG"),
        (np.zeros((4, 4, 3), np.uint8), "p", ["a"], ImageError, "an image is a ndarray; it must be a path"),
        ([None], "p", ["a"], ImageError, "an image is a NoneType"),
        ("https://example.org/a.png", "p", ["a"], ImageError, "nothing is fetched"),
        ([Image.new("RGB", (9, 9))] * 2, "<image> p", ["a"], ValueError, "images and places differ"),
        (Image.new("1", (60000, 60000)), "p", ["a"], ImageError, "over the limit"),
    ],
)
def test_what_cannot_be_scored_is_said(rm, image, prompt, responses, error, reason):
    with pytest.raises(error, match=reason):
        rm.score(image, prompt, responses)


def test_of_many_requests_the_bad_one_is_named(rm):
    with pytest.raises(ValueError, match="request 1: empty response"):
        rm.score_many([(None, "p", ["a"]), (None, "p", [""])])
    with pytest.raises(ValueError, match="proxy is not loaded"):
        rm.score_many([(None, "p", ["a"])], branch="proxy")


def test_a_model_without_a_head_or_a_proxy_is_refused():
    with pytest.raises(ValueError, match="no score.weight"):
        mmrm_jax.load(MODEL_DIR)
    with pytest.raises(ValueError, match="holds no proxy"):
        mmrm_jax.load(MODEL_DIR, draw_score=0, proxy=True)
    with pytest.raises(ValueError, match="batch_size is 0"):
        mmrm_jax.load(MODEL_DIR, draw_score=0, batch_size=0)


@pytest.mark.parametrize("sees", ["absent", "blank"])
def test_the_proxy_of_an_export_is_read_with_what_it_sees(tmp_path, capsys, sees):
    file = write_pairs(tmp_path, "pairs", 12)
    settings = [a.replace("--train.", "--") for a in FAST]
    train = ("train", "--data", file, "--out", tmp_path / "run", "--steps", 2, "--data.holdout", 0, *settings)
    assert run(capsys, *train, "--proxy-input", sees)[0] == 0
    assert run(capsys, "export", "--run", tmp_path / "run", "--out", tmp_path / "model", "--proxy")[0] == 0
    rm = mmrm_jax.load(tmp_path / "model", proxy=True)
    assert rm.views == {"primary": "multimodal", "proxy": sees}
    asked = [(tmp_path / "images" / f"pairs-{i}.png", "Colour?", ["It is red.", "It is blue."]) for i in range(4)]
    primary, proxy = (np.stack(rm.score_many(asked, branch)) for branch in ("primary", "proxy"))
    assert np.ptp(proxy, axis=0).max() < 1e-6 < np.ptp(primary, axis=0).max()  # the proxy sees no image
    # The proxy's own weights as a model of its own, shown nothing.
    config = rm.checkpoint.config
    weights, _ = load_params(tmp_path / "model", config, abstract_model(config)[1], branch="proxy")
    other = mmrm_jax.load(tmp_path / "model")
    other.params = {"primary": weights}
    white = Image.new("RGB", (32, 32), "white") if sees == "blank" else None
    np.testing.assert_allclose(proxy[0], other.score(white, "Colour?", ["It is red.", "It is blue."]), atol=CLOSE)


# ---- shapes


def test_steps_waste_less_than_half():
    steps = {step_up(n, 16) for n in range(1, 4097)}
    assert sorted(steps)[:6] == [16, 24, 32, 48, 64, 96] and len(steps) == 17
    assert all(n <= step_up(n, 16) < max(17, 1.5 * n) for n in range(1, 4097))
    assert [step_up(n) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]


def test_whatever_comes_there_are_few_shapes():
    ladder, rng = Ladder(max_length=4096, tiles=7, image_size=448), np.random.default_rng(0)
    seen = set()
    for _ in range(3000):
        tiles = int(rng.integers(8))
        lengths = tuple(map(int, rng.integers(1, rng.integers(2, 1000), size=rng.integers(1, 65))))
        group = GroupShape({"primary": 256 * tiles + int(rng.integers(1, 1000))}, lengths, tiles, 0)
        shape = ladder.shape(group)
        assert shape.fits(group) and shape.tiles < max(1.5 * tiles, 1 + tiles)
        assert shape.rows[0] <= 64 and shape.rows[1] <= 4096 and shape.prefixes["primary"] <= 4096
        seen.add((shape.prefixes["primary"], shape.rows, shape.tiles))
    assert len({rows for _, rows, _ in seen}) < 7 * 19  # powers of two up to 64, and steps from 8 to 4096
    assert len({prefix for prefix, _, _ in seen}) <= 17 and {tiles for _, _, tiles in seen} == {0, 1, 2, 3, 4, 6, 7}


def test_the_limit_of_the_model_is_the_last_step():
    ladder = Ladder(max_length=100, tiles=1, image_size=32)
    shape = ladder.shape(GroupShape({"primary": 99}, (97,), 0, 0))
    assert (shape.prefixes, shape.rows) == ({"primary": 100}, (1, 100))
    with pytest.raises(ValueError, match="at most 64"):
        ladder.shape(GroupShape({"primary": 9}, (1,) * 65, 0, 0))


def test_requests_of_one_shape_are_compiled_once(image):
    rm = mmrm_jax.load(MODEL_DIR, draw_score=3, batch_size=8)
    for i in range(3):
        rm.score(image, f"What is {i}?", ["A pear.", f"Noise {i}."])
    assert rm._steps["primary"]._cache_size() == 1


def test_importing_the_package_stays_cheap():
    code = (
        "import sys, mmrm_jax; mmrm_jax.__version__; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        mmrm_jax.laod  # noqa: B018
