"""What a checkpoint folder says of preprocessing, in either layout, and that saving it loses nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_templates import NATIVE
from tokenizer_folders import CHATML_TOKENS, save_json, save_sentencepiece, save_vocabulary

from mmrm_jax.config import DataConfig
from mmrm_jax.data.images import Preprocessing, tile_image
from mmrm_jax.data.processor import SAVED, Processor, read_preprocessing
from mmrm_jax.data.templates import TEMPLATES
from mmrm_jax.data.text import ChatTokenizer
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.tiny.tokenizer import train_tokenizer
from mmrm_jax.train.setup import open_checkpoint
from mmrm_jax.types import Group

V = 4
MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.75, 1.0)
IMAGE = {
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "crop_to_patches": False,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "min_patches": 1,
    "max_patches": 12,
    "size": {"height": 28, "width": 28},
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


def write(folder: Path, **files: dict) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def tiny():
    return train_tokenizer()


@pytest.fixture
def native(tiny, tmp_path) -> Path:
    folder = save_json(tmp_path / "native", tiny)
    (folder / "chat_template.jinja").write_text(NATIVE)
    config = {"model_type": "internvl", "text_config": {}, "vision_config": {"image_size": [28, 28]}}
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": V}
    return write(folder, config=config, processor_config=processor, preprocessor_config=IMAGE)


def test_chat_layout(tiny, tmp_path) -> None:
    save_json(tmp_path, tiny)
    write(tmp_path, config={"template": "internvl2_5", "vision_config": {"image_size": 28}, "max_dynamic_patch": 12})
    read = Processor.from_pretrained(tmp_path, V)
    assert read.chat.template is TEMPLATES["internvl2_5"]
    plain = {"use_thumbnail": False, "dynamic": False}
    assert read.preprocessing == Preprocessing(28, 1, 12, **plain)  # ImageNet's mean and std
    assert read.max_length == 4096
    write(tmp_path, preprocessor_config={"image_mean": list(MEAN), "image_std": list(STD), "size": 448})
    read = Processor.from_pretrained(tmp_path, V, max_tiles=2, max_length=99)
    assert read.preprocessing == Preprocessing(28, 1, 2, **plain, mean=MEAN, std=STD) and read.max_length == 99


def test_native_layout(native) -> None:
    """Images are cut into tiles whatever `crop_to_patches` says, as transformers' InternVLProcessor does."""
    read = Processor.from_pretrained(native, V)
    assert read.chat.template.name == "chatml"
    assert read.preprocessing == Preprocessing(28, 1, 12, mean=MEAN, std=STD)
    # Since transformers 5 the image processor is part of processor_config.json.
    (native / "preprocessor_config.json").unlink()
    write(native, processor_config={"image_seq_length": V, "image_processor": IMAGE | {"max_patches": 3}})
    assert Processor.from_pretrained(native, V).preprocessing == Preprocessing(28, 1, 3, mean=MEAN, std=STD)


@pytest.mark.parametrize("size", [(90, 60), (60, 60), (29, 200)])
def test_native_tiles_are_those_of_transformers(native, size) -> None:
    """On images as large as their grid, where the two ways to resize tall ones cannot differ."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    p = read_preprocessing(native, V)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = GotOcr2ImageProcessorPil(**{k: v for k, v in IMAGE.items() if k != "image_processor_type"})
    wanted = np.asarray(theirs(image, crop_to_patches=True, return_tensors="np")["pixel_values"])
    ours = ((tile_image(image, p) / 255 - p.mean) / p.std).transpose(0, 3, 1, 2)
    assert ours.shape == wanted.shape
    tall = size[1] > 2 * size[0]
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=0.2 if tall else 1e-5)


def encoded(processor: Processor, picture: bytes) -> list:
    group = Group("0", " <|im_end|> the\n", ("the cat", " cat ", "é🟦"), (), picture, "e", "f", 1)
    views = {"primary": "multimodal", "proxy": "blank"}
    out = processor.encode(group, 0, views)
    arrays = [out.tiles.tolist(), [r.tolist() for r in out.responses]]
    return [*arrays, {b: (c.tokens.tolist(), c.visual.tolist()) for b, c in out.prefixes.items()}]


@pytest.mark.parametrize("kind", ["json", "vocabulary", "llama", "new", "native"])
def test_what_is_saved_is_read_back(kind: str, tiny, tmp_path, native) -> None:
    picture = native / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(picture)
    config = {"template": "Hermes-2", "vision_config": {"image_size": 28}, "max_dynamic_patch": 3}
    if kind == "new":
        chat = ChatTokenizer(train_tokenizer(), TEMPLATES["Hermes-2"], V)
        processor = Processor(chat, Preprocessing(28, 2, 3, use_thumbnail=False, mean=MEAN, std=STD), 777)
    elif kind == "native":
        processor = Processor.from_pretrained(native, V, max_tiles=5, max_length=88)
    else:
        folder = tmp_path / "model"
        if kind == "llama":
            save_sentencepiece(folder, CHATML_TOKENS, config={"legacy": False})
        else:
            {"json": save_json, "vocabulary": save_vocabulary}[kind](folder, tiny)
        processor = Processor.from_pretrained(write(folder, config=config), V, max_length=500)
    processor.save(tmp_path / "saved")
    for read in (Processor.from_pretrained(tmp_path / "saved", V), pickle.loads(pickle.dumps(processor))):
        assert read.preprocessing == processor.preprocessing
        assert read.max_length == processor.max_length
        assert read.chat.template == processor.chat.template
        assert encoded(read, picture) == encoded(processor, picture)
    # Saving where it was read from changes nothing, and settings of one use win over what was saved.
    again = Processor.from_pretrained(tmp_path / "saved", V)
    again.save(tmp_path / "saved")
    assert encoded(Processor.from_pretrained(tmp_path / "saved", V), picture) == encoded(processor, picture)
    other = Processor.from_pretrained(tmp_path / "saved", V, max_tiles=2, max_length=9)
    assert (other.preprocessing.max_tiles, other.max_length) == (2, 9)


def test_what_was_saved_counts_more_than_the_files_beside_it(tiny, tmp_path) -> None:
    chat = ChatTokenizer(tiny, TEMPLATES["chatml"], V)
    Processor(chat, Preprocessing(28, mean=MEAN), 50).save(tmp_path)
    write(tmp_path, config={"template": "Hermes-2", "vision_config": {"image_size": 56}})
    read = Processor.from_pretrained(tmp_path, V)
    assert (read.chat.template.name, read.preprocessing.image_size, read.max_length) == ("chatml", 28, 50)
    with pytest.raises(ValueError, match=rf"{SAVED}: visual_tokens_per_tile is 4, but the model has 16"):
        Processor.from_pretrained(tmp_path, 16)


def test_a_tokenizer_whose_files_are_gone_is_not_saved(tiny, tmp_path) -> None:
    folder = write(save_json(tmp_path / "a", tiny), config={"template": "chatml", "vision_config": {"image_size": 28}})
    processor = Processor.from_pretrained(folder, V)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="a no longer holds the tokenizer"):
        processor.save(tmp_path / "b")


def test_the_model_normalises_as_its_checkpoint_says(tmp_path) -> None:
    for file in MODEL_DIR.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert open_checkpoint(tmp_path, DataConfig()).config.vision.mean == Preprocessing.mean
    write(tmp_path, preprocessor_config={"image_mean": list(MEAN), "image_std": list(STD)})
    vision = open_checkpoint(tmp_path, DataConfig()).config.vision
    assert (vision.mean, vision.std) == (MEAN, STD)


CHAT = {"template": "chatml", "vision_config": {"image_size": 28}}


def saved_with(**changes: object) -> dict:
    """What `Processor.save` writes, with changes."""
    return {"template": "chatml", "visual_tokens_per_tile": V, "max_length": 9, "preprocessing": {}} | changes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": CHAT | {"pad2square": True}}, r"config.json: pad2square is not supported"),
        ({"config": {"template": "chatml"}}, r"config.json: how images are prepared .*vision_config"),
        ({"config": CHAT | {"force_image_size": "448"}}, r"config.json: how images are prepared .*image_size is '448'"),
        ({"config": CHAT | {"max_dynamic_patch": 0}}, r"config.json: how images are prepared .*max_tiles is 0"),
        (
            {"config": CHAT, "preprocessor_config": {"image_mean": 0.5}},
            r"preprocessor_config.json: image_mean .*mean is 0.5",
        ),
        ({"config": CHAT, "preprocessor_config": {"image_std": [1, 2]}}, r"std is \(1, 2\); it must be three"),
        (
            {"config": CHAT, "preprocessor_config": {"image_std": [1, 1, 0]}},
            r"preprocessor_config.json: .*three positive numbers",
        ),
        (
            {"config": CHAT | {"use_thumbnail": "false"}},
            r"config.json: how images are prepared .*use_thumbnail is 'false'",
        ),
        ({"config": CHAT | {"dynamic_image_size": 0}}, r"config.json: how images are prepared .*dynamic is 0"),
        ({"config": CHAT, SAVED[:-5]: {"template": "chatml"}}, rf"{SAVED} cannot be read: KeyError"),
        *(
            ({"config": CHAT, SAVED[:-5]: saved_with(**changes)}, rf"{SAVED} cannot be read: .*{message}")
            for changes, message in (
                ({"preprocessing": {"dynamic": "false"}}, "dynamic is 'false'"),
                ({"preprocessing": {"mean": "abc"}}, "mean is 'abc'"),
                ({"preprocessing": {"max_tiles": 10**9}}, "max_tiles is 1000000000"),
                ({"preprocessing": {"max_patches": 3}}, "max_patches"),
                ({"preprocessing": [28]}, "has no attribute 'items'"),
                ({"max_length": 0}, "max_length is 0"),
                ({"max_length": "9"}, "max_length is '9'"),
            )
        ),
        ({"config": {"text_config": {}}}, r"preprocessor_config.json does not exist"),
        (
            {"config": {"text_config": {}}, "preprocessor_config": IMAGE | {"size": 448}},
            r"preprocessor_config.json: how images",
        ),
        (
            {"config": {"text_config": {}}, "preprocessor_config": IMAGE | {"size": {"height": 28, "width": 56}}},
            r"preprocessor_config.json: how images are prepared .*28 x 56, but tiles must be square",
        ),
        *(
            (
                {"config": {"text_config": {}}, "preprocessor_config": IMAGE | {name: value}},
                rf"preprocessor_config.json: how images are prepared .*{name} is {value!r}; supported: ",
            )
            for name, value in (("resample", 2), ("rescale_factor", 1 / 127.5), ("do_normalize", False))
        ),
        (  # transformers would take CLIP's; nothing is assumed
            {
                "config": {"text_config": {}},
                "preprocessor_config": {k: v for k, v in IMAGE.items() if k != "image_mean"},
            },
            r"preprocessor_config.json: how images .*KeyError\('image_mean'\)",
        ),
        (
            {"config": {"text_config": {}}, "processor_config": {"image_seq_length": 9}},
            r"processor_config.json: image_seq_length is 9, but a tile becomes 4 tokens",
        ),
        (
            {"config": {"text_config": {}}, "processor_config": {"image_processor": "x"}},
            r"processor_config.json: how images are prepared",
        ),
    ],
)
def test_unusable_settings_are_named(files: dict, message: str, tiny, tmp_path) -> None:
    save_json(tmp_path, tiny)
    (tmp_path / "chat_template.jinja").write_text(NATIVE)
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        Processor.from_pretrained(tmp_path, V)


def test_several_images_of_a_prompt(native) -> None:
    """Tiles of each image, in order, at its own place; the blank tile in the place of each; none for `absent`."""
    processor = Processor.from_pretrained(native, V, max_tiles=3)
    wide, square = native / "wide.png", native / "square.png"
    for path, size in ((wide, (28, 56, 3)), (square, (28, 28, 3))):
        Image.fromarray(np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8)).save(path)
    group = Group("0", "A: <image>\nB: <image>\nsame?", ("the", "cat"), (), wide, "e", "f", 1, more_images=(square,))
    views = {"primary": "multimodal", "proxy": "blank", "text": "absent", "image": "image_only"}
    out = processor.encode(group, 0, views)
    assert out.shape == processor.measure(group, views) and out.shape.tiles == 4  # two, their thumbnail, and one
    np.testing.assert_array_equal(out.tiles, np.concatenate([processor.tiles(path) for path in (wide, square)]))
    shown = {branch: c.visual[c.visual >= 0].tolist() for branch, c in out.prefixes.items()}
    assert shown == {"primary": [*range(4 * V)], "proxy": [*range(V)] * 2, "text": [], "image": [*range(4 * V)]}
    visual = out.prefixes["primary"].visual
    gap = np.flatnonzero(visual == 3 * V)[0] - np.flatnonzero(visual == 3 * V - 1)[0]
    assert gap > 3  # "B: " and the image's own tokens stand between the two
    text = processor.chat.tokenizer.decode(out.prefixes["text"].tokens.tolist())
    assert "A: \nB: \nsame?" in text and "<image>" not in text
    again = processor.encode(group, 0, views, features=[np.zeros((3, V, 2)), np.ones((1, V, 2))])
    assert again.tiles.shape == (4, V, 2) and again.shape == out.shape
