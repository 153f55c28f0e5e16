"""The shapes world: its pictures, sentences, rates and cues, its TFDS builder, and the tiny model's tokenizer."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrm_jax.data import shapes
from mmrm_jax.data.shapes import Scene, WorldRates

SHARED = Path(__file__).parents[1].parent / "shared"
SAMPLES = 2000


def _sample(
    environment: str, count: int = SAMPLES, rates: WorldRates = shapes.DEFAULT_RATES
) -> list[shapes.SampledComparison]:
    return [shapes.scene_truth(11, environment, "train", i, rates) for i in range(count)]


@pytest.fixture(scope="module")
def sampled() -> dict[str, list[shapes.SampledComparison]]:
    return {environment: _sample(environment) for environment in shapes.ENVIRONMENTS}


def _assert_rate(hits: list[bool], probability: float) -> None:
    """Four standard deviations of the binomial."""
    bound = 4 * math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(np.mean(hits) - probability) < bound, f"{np.mean(hits):.3f}, expected {probability} +- {bound:.3f}"


def _style(response: str, plain: str) -> str:
    """The style of a response, read off its text alone."""
    if response == plain:
        return "plain"
    return "long" if response.startswith(plain.removesuffix(".") + ",") else "hedged"


# --- pictures


def test_render_shape_dtype_and_determinism():
    scene = Scene("circle", "red", "large", "centre")
    pixels = shapes.render(scene, np.random.default_rng(0))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, shapes.render(scene, np.random.default_rng(0)))
    assert (pixels != shapes.render(scene, np.random.default_rng(1))).any()


@pytest.mark.parametrize("attribute", list(shapes.VALUES))
def test_pictures_show_each_attribute(attribute: str):
    """With the same jitter and noise, changing one attribute changes many pixels by much more than the noise."""
    scene = Scene("square", "red", "small", "centre")
    seen = []
    for value in shapes.VALUES[attribute]:
        pixels = shapes.render(dataclasses.replace(scene, **{attribute: value}), np.random.default_rng(3))
        seen.append(pixels.astype(int))
    for i, first in enumerate(seen):
        for second in seen[:i]:
            assert (np.abs(first - second).max(axis=-1) > 25).sum() >= 8


@pytest.mark.parametrize("colour", list(shapes.COLOURS))
def test_the_centre_has_the_named_colour_and_the_corner_is_greyish(colour: str):
    for seed in range(20):
        pixels = shapes.render(Scene("square", colour, "small", "centre"), np.random.default_rng(seed)).astype(int)
        distances = {c: np.abs(pixels[15:17, 15:17].mean(axis=(0, 1)) - rgb).sum() for c, rgb in shapes.COLOURS.items()}
        assert min(distances, key=lambda c: distances[c]) == colour
        assert np.ptp(pixels[:4, :4].mean(axis=(0, 1))) < 25


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_place_and_size_can_be_measured(shape: str):
    """Saturated pixels: their centroid is within 2.5 px of the named place, large has over twice small's area."""
    for position, (dx, dy) in shapes.PLACES.items():
        areas = {}
        for size in shapes.RADII:
            pixels = shapes.render(Scene(shape, "blue", size, position), np.random.default_rng(5)).astype(int)
            rows, columns = np.nonzero(np.ptp(pixels, axis=-1) > 80)
            assert abs(columns.mean() + 0.5 - 16 - dx) < 2.5 and abs(rows.mean() + 0.5 - 16 - dy) < 2.5
            areas[size] = len(rows)
        assert areas["large"] > 2 * areas["small"] > 30


def test_png_is_lossless():
    pixels = shapes.render(Scene("cross", "green", "small", "top"), np.random.default_rng(0))
    decoded = np.asarray(Image.open(io.BytesIO(shapes.encode_png(pixels))))
    np.testing.assert_array_equal(decoded, pixels)


def test_unknown_values_are_named():
    with pytest.raises(ValueError, match=r"Scene.shape is 'hexagon'.*circle"):
        shapes.render(Scene("hexagon", "red", "small", "top"), np.random.default_rng(0))
    with pytest.raises(ValueError, match="no environment 'lnog'; choose one of long"):
        shapes.make_group(0, "lnog", "train", 0)
    with pytest.raises(ValueError, match="no split 'dev'"):
        shapes.make_group(0, "long", "dev", 0)
    with pytest.raises(ValueError, match=r"label_noise is 1\.5"):
        WorldRates(label_noise=1.5)
    with pytest.raises(ValueError, match=r"image_noise is -1"):
        WorldRates(image_noise=-1)
    with pytest.raises(ValueError, match="plain, long or hedged"):
        shapes.style_answer("It is| red.", "rude", np.random.default_rng(0))


def test_the_noise_of_pictures_has_the_deviation_that_it_says():
    scene = Scene("circle", "red", "small", "top")
    plain = shapes.render(scene, np.random.default_rng(0), 0.0).astype(float)
    for noise in (4.0, 20.0):
        found = shapes.render(scene, np.random.default_rng(0), noise).astype(float) - plain
        inside = (plain > 80) & (plain < 175)  # where nothing is clipped
        assert found[inside].std() == pytest.approx(noise, rel=0.08)
    assert np.array_equal(
        shapes.render(scene, np.random.default_rng(0)), shapes.render(scene, np.random.default_rng(0), 4.0)
    )


# --- sentences


def test_right_answer_states_the_scene_and_wrong_differs_in_one_asked_attribute(sampled):
    kinds = Counter()
    for s in sampled["neutral"]:
        question = next(q for q in shapes.QUESTIONS if s.prompt in q.prompts)
        assert s.changed in question.asks
        kinds[question.asks] += 1
        words = {a: shapes._WORDING.get(getattr(s.scene, a), getattr(s.scene, a)) for a in question.asks}
        assert all(w in s.right for w in words.values())
        assert words[s.changed] not in s.wrong
        other = next(v for v in shapes.VALUES[s.changed] if shapes._WORDING.get(v, v) in s.wrong)
        assert s.wrong == s.right.replace(words[s.changed], shapes._WORDING.get(other, other))
        styled = s.responses[s.right_index], s.responses[1 - s.right_index]
        found = [_style(*p) for p in zip(styled, (s.right, s.wrong), strict=True)]
        assert s.right != s.wrong and sorted(found) == sorted(["plain", s.style])
    assert len(kinds) == 4 and min(kinds.values()) > 0.2 * SAMPLES


def test_fillers_and_hedges_say_nothing_about_the_facts():
    facts = {v for values in shapes.VALUES.values() for v in values}
    for text in shapes.FILLERS + shapes.HEDGES:
        assert not facts & set(text.replace(",", "").lower().split()), text
        assert text.isascii() and 5 <= len(text.replace(",", "").split()) <= 10
    assert len(set(shapes.FILLERS)) == 8 and len(set(shapes.HEDGES)) == 8


def test_styles_worked_out():
    rng = np.random.default_rng(0)
    assert shapes.style_answer("The shape is| red.", "plain", rng) == "The shape is red."
    hedged = {shapes.style_answer("The shape is| red.", "hedged", rng) for _ in range(200)}
    assert "I am not entirely sure, but I think the shape is red." in hedged
    assert "The shape is, if I am not mistaken, red." in hedged and len(hedged) == 8
    long = {shapes.style_answer("The shape is| red.", "long", rng) for _ in range(2000)}
    assert "The shape is red, as anyone can see in the scene." in long
    assert len(long) == 8 and not any("|" in text for text in long | hedged)


# --- rates and cues


def test_label_noise_cue_agreement_and_order(sampled):
    for environment, rows in sampled.items():
        _assert_rate([s.label_is_right for s in rows], 0.9)
        _assert_rate([s.right_index == 0 for s in rows], 0.5)
        _assert_rate([s.winner == 0 for s in rows], 0.5)
        if environment != "neutral":
            _assert_rate([bool(s.cue_agrees) for s in rows], 0.9)
            # Independent of the label noise.
            _assert_rate([bool(s.cue_agrees) for s in rows if not s.label_is_right], 0.9)


def test_cues_are_in_the_texts(sampled):
    """The environment's rule, read off the responses alone, picks the winner exactly as often as `cue_agrees` says."""
    for environment, rows in sampled.items():
        styled_wins = []
        for s in rows:
            plains = (s.right, s.wrong) if s.right_index == 0 else (s.wrong, s.right)
            found = [_style(r, p) for r, p in zip(s.responses, plains, strict=True)]
            assert sorted(found) == sorted(["plain", s.style]) and found[s.styled_index] == s.style
            styled_wins.append(s.winner == s.styled_index)
            if environment != "neutral":
                assert s.style == ("hedged" if environment == "hedged" else "long")
                assert s.cue_agrees == (styled_wins[-1] == (environment == "long"))
                longer = int(len(s.responses[1]) > len(s.responses[0]))
                assert longer == s.styled_index  # every style makes an answer longer
            else:
                assert s.cue_agrees is None
        _assert_rate(styled_wins, {"long": 0.9, "hedged": 0.1, "short": 0.1, "neutral": 0.5}[environment])
    _assert_rate([s.style == "long" for s in sampled["neutral"]], 0.5)


def test_rates_are_followed_at_their_ends():
    rows = _sample("short", 100, WorldRates(cue_agreement=1.0, label_noise=0.0))
    assert all(s.label_is_right and s.cue_agrees and s.winner != s.styled_index for s in rows)
    rows = _sample("long", 100, WorldRates(cue_agreement=0.0, label_noise=1.0))
    assert not any(s.label_is_right or s.cue_agrees for s in rows)


# --- groups and captions


def test_groups_depend_on_their_arguments_only():
    group = shapes.make_group(0, "long", "train", 12)
    assert group == shapes.make_group(0, "long", "train", 12)
    assert (group.id, group.file, group.row) == ("shapes-long-train-00012", "shapes_world/long", 13)
    truth = shapes.scene_truth(0, "long", "train", 12)
    assert group.responses == truth.responses and group.image == shapes.encode_png(truth.pixels)
    (comparison,) = group.comparisons
    assert (comparison.winner, comparison.loser) == (truth.winner, 1 - truth.winner)
    others = [(1, "long", "train", 12), (0, "short", "train", 12), (0, "long", "test", 12), (0, "long", "train", 13)]
    assert all(shapes.make_group(*other).image != group.image for other in others)


def test_captions_are_right_and_of_known_styles():
    captions = [shapes.make_caption(0, i) for i in range(1000)]
    again = shapes.make_caption(0, 7)
    assert (again.prompt, again.answer) == (captions[7].prompt, captions[7].answer)
    np.testing.assert_array_equal(again.pixels, captions[7].pixels)
    hedges = [h for h in shapes.HEDGES]
    is_hedged = [any(h in c.answer for h in hedges) for c in captions]
    is_long = [any(f in c.answer for f in shapes.FILLERS) for c in captions]
    _assert_rate(is_hedged, 0.25)
    _assert_rate(is_long, 0.25)
    assert not any(h and lo for h, lo in zip(is_hedged, is_long, strict=True))
    named = [c for c in captions if c.prompt == "Which colour is the shape?"]
    for caption in named:
        spread = np.ptp(caption.pixels.astype(int), axis=-1)
        middle = caption.pixels[spread >= np.percentile(spread, 99)].mean(axis=0)
        distances = {c: np.abs(middle - rgb).sum() for c, rgb in shapes.COLOURS.items()}
        assert min(distances, key=lambda c: distances[c]) in caption.answer
    assert named


# --- the TFDS builder


def test_builder_round_trip(tmp_path: Path):
    tfds = pytest.importorskip("tensorflow_datasets")
    from mmrm_jax.data.tfds.features import decode_group
    from mmrm_jax.data.tfds.shapes_world import build_shapes_world

    rates = WorldRates(cue_agreement=0.8, label_noise=0.1)
    paths = build_shapes_world(tmp_path, train=12, validation=5, test=4, seed=3, rates=rates)
    assert list(paths) == ["long", "hedged", "short", "neutral"]
    for environment, path in paths.items():
        builder = tfds.builder_from_directory(path)
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        assert sizes == {"validation": 5, "test": 4} | ({} if environment == "neutral" else {"train": 12})
        assert dict(builder.info.metadata) == {
            "environment": environment,
            "seed": 3,
            "cue_agreement": 0.8,
            "label_noise": 0.1,
            "image_noise": 4.0,
        }
        for split, size in sizes.items():
            groups = [decode_group(example) for example in builder.as_data_source(split)]
            assert groups == [shapes.make_group(3, environment, split, i, rates) for i in range(size)]

    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert build_shapes_world(tmp_path, train=12, validation=5, test=4, seed=3, rates=rates) == paths
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == stamps
    other = build_shapes_world(tmp_path, environments=("long",), train=12, validation=5, test=4, seed=4, rates=rates)
    assert other["long"] != paths["long"]
    noisy = dataclasses.replace(rates, image_noise=30.0)
    other = build_shapes_world(tmp_path, environments=("long",), train=2, validation=1, test=1, seed=3, rates=noisy)
    example = next(iter(tfds.builder_from_directory(other["long"]).as_data_source("train")))
    assert decode_group(example) == shapes.make_group(3, "long", "train", 0, noisy)
    assert decode_group(example) != shapes.make_group(3, "long", "train", 0, rates)


@pytest.mark.parametrize(("on", "other"), [("test", "validation"), ("validation", "test")])
def test_the_quickstart_renders_what_it_tests_on_alone(tmp_path: Path, on, other):
    tfds = pytest.importorskip("tensorflow_datasets")
    from mmrm_jax.eval.quickstart import CONFIG, with_shapes_world

    config = with_shapes_world(dataclasses.replace(CONFIG, on=on), tmp_path, 17)
    for environment in config.environments:
        folder, _, split = str(environment.test if on == "test" else environment.validation).rpartition(":")
        sizes = {name: info.num_examples for name, info in tfds.builder_from_directory(folder).info.splits.items()}
        assert split == on and other not in sizes and sizes[on] == 2
        assert sizes.get("train") == (None if environment.train is None else 17)
    with pytest.raises(ValueError, match="comparisons is 7"):
        with_shapes_world(CONFIG, tmp_path, 7)


def test_builder_configs_are_checked():
    pytest.importorskip("tensorflow_datasets")
    from mmrm_jax.data.tfds.shapes_world import ShapesWorld, shapes_world_config

    assert [c.name for c in ShapesWorld.BUILDER_CONFIGS] == ["long", "hedged", "short", "neutral"]
    assert [c.sizes for c in ShapesWorld.BUILDER_CONFIGS[2:]] == [
        {"train": 8192, "validation": 1024, "test": 1024},
        {"validation": 1024, "test": 1024},
    ]
    with pytest.raises(ValueError, match="no environment 'lnog'"):
        shapes_world_config("lnog")
    with pytest.raises(ValueError, match="the test of a shapes world is -1"):
        shapes_world_config("long", test=-1)
    with pytest.raises(ValueError, match=r"all splits .* 'neutral' are empty"):
        shapes_world_config("neutral", validation=0, test=0)


def test_no_tensorflow():
    pytest.importorskip("tensorflow_datasets")
    code = "import mmrm_jax.data.tfds.shapes_world, sys; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


# --- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    from mmrm_jax.tiny.tokenizer import train_tokenizer

    return train_tokenizer()


def test_tokenizer_training_is_deterministic(tokenizer):
    from mmrm_jax.tiny.tokenizer import train_tokenizer

    assert train_tokenizer().to_str() == tokenizer.to_str()


def test_tokenizer_vocabulary_and_round_trip(tokenizer):
    from mmrm_jax.tiny.tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE

    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(VOCABULARY_SIZE - 6, VOCABULARY_SIZE))
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nCafé, it's 12 o'clock!  \U0001f34e\n\n<|im_end|>"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert encoded.ids.count(tokenizer.token_to_id("<IMG_CONTEXT>")) == 1
    # NFC: a combining accent is the same text as the composed letter. Digits stay single, as in Qwen2.
    assert tokenizer.encode("Cafe\u0301").ids == tokenizer.encode("Caf\u00e9").ids
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]
    assert tokenizer.encode("The shape is red.").tokens == ["The", "Ġshape", "Ġis", "Ġred", "."]


def test_tokenizer_needs_few_tokens_a_word(tokenizer):
    path = SHARED / "data" / "grocery" / "texts.json"
    if not path.exists():
        pytest.skip("the grocery descriptions are not in shared/data")
    texts = [entry["description"] for entry in json.loads(path.read_text(encoding="utf-8")).values()]
    words = sum(len(text.split()) for text in texts)
    assert sum(len(tokenizer.encode(text).ids) for text in texts) / words < 1.9


def test_saved_tokenizer_loads_in_transformers(tokenizer, tmp_path: Path):
    import transformers  # slow to import

    from mmrm_jax.tiny.tokenizer import save_tokenizer

    save_tokenizer(tokenizer, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == ("<|im_end|>", "<|endoftext|>", 2048)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nIs it a ripe apple, don't you think?<|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
