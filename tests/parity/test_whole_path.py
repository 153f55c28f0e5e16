"""A `*-hf` folder from its files to rewards, against transformers' own tokenizer, image processor and model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[test,parity]'")

import numpy as np
from commands import FAST, run, write_pairs
from native_folder import MEAN, STD, TOKENS_PER_TILE, image_processor, make_tokenizer, save_native
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from mmrm_jax.eval.saved_run import read_run
from mmrm_jax.eval.score import score_file
from mmrm_jax.models.hf.weights import load_params
from mmrm_jax.train.setup import open_checkpoint
from mmrm_jax.train.state import abstract_model, merge_branch
from mmrm_jax.types import Group

pytestmark = pytest.mark.filterwarnings("default")
MODELS = ("qwen2", "qwen3", "llama llama3", "phi3 longrope")
# Landscape and square: transformers resizes tall images in the order of the Pillow that is installed, mmrm_jax in the
# one InternVL was trained with.
SIZES = ((40, 20), (30, 30), (37, 25), (90, 11))
PROMPTS = ("What is this?", " two  spaces,\n\nlines\t", "naïve 图片 🟦 12345", "it's <b>bold</b> 3.14")
RESPONSES = ("A red circle.", " It's\na cat! ", "一只猫 and 42 dogs", "no")


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def their_input(folder: Path, image: Image.Image, prompt: str, response: str) -> dict[str, torch.Tensor]:
    """As InternVLProcessor makes it, which itself cannot be built without torchvision."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    user = [{"type": "image"}, {"type": "text", "text": prompt}]
    answer = [{"type": "text", "text": response}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pixels = image_processor()(image, crop_to_patches=True, return_tensors="pt")["pixel_values"]
    slots = tokenizer.context_image_token * (TOKENS_PER_TILE * len(pixels))
    assert text.count(tokenizer.context_image_token) == 1
    text = text.replace(tokenizer.context_image_token, tokenizer.start_image_token + slots + tokenizer.end_image_token)
    return {"input_ids": tokenizer(text, return_tensors="pt").input_ids, "pixel_values": pixels}


def reward(model: InternVLForConditionalGeneration, folder: Path, inputs: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        last = model.model(**inputs).last_hidden_state[0, -1]
    return float(load_file(folder / "model.safetensors")["score.weight"][0].float() @ last.float())


@pytest.mark.parametrize("era", ["4", "5"])
def test_tokens_and_tiles(era: str, tmp_path: Path) -> None:
    save_native(tmp_path, "qwen2", era=era)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.processor.chat.template.name == "chatml"
    assert (checkpoint.config.vision.mean, checkpoint.config.vision.std) == (tuple(MEAN), tuple(STD))
    for i, (size, prompt) in enumerate(zip(SIZES, PROMPTS)):
        image = picture(size, i)
        image.save(tmp_path / "picture.png")
        group = Group("0", prompt, RESPONSES, (), tmp_path / "picture.png", "e", "f", 1)
        ours = checkpoint.processor.encode(group, 0, {"primary": "multimodal"})
        conversation = ours.prefixes["primary"]
        for response, tail in zip(RESPONSES, ours.responses):
            theirs = their_input(tmp_path, image, prompt, response)
            tokens = np.concatenate([conversation.tokens, tail])
            np.testing.assert_array_equal(tokens, theirs["input_ids"][0], err_msg=f"{prompt!r}, {response!r}")
        slots = theirs["input_ids"][0][: len(conversation.tokens)] == checkpoint.processor.chat.special_id(
            "<IMG_CONTEXT>"
        )
        np.testing.assert_array_equal(conversation.visual >= 0, slots)
        np.testing.assert_array_equal(conversation.visual[conversation.visual >= 0], np.arange(int(slots.sum())))
        tiles = theirs["pixel_values"].permute(0, 2, 3, 1).numpy() * np.float32(STD) + np.float32(MEAN)
        assert len(tiles) == len(ours.tiles) > 1 or size == (30, 30)
        np.testing.assert_array_equal(ours.tiles, np.rint(tiles * 255))
        np.testing.assert_allclose(tiles * 255, np.rint(tiles * 255), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_rewards(name: str, tmp_path: Path) -> None:
    """Row by row, though mmrm_jax pads, batches, and shares what responses have in common."""
    folder, rows = tmp_path / "model", []
    model = save_native(folder, name, era="4" if name == "qwen2" else "5")
    for i, (size, prompt) in enumerate(zip(SIZES, PROMPTS)):
        picture(size, i).save(tmp_path / f"{i}.png")
        rows.append({"prompt": prompt, "img_path": f"{i}.png", "responses": RESPONSES})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = scored(folder, tmp_path / "rows.jsonl", tmp_path / "scores.jsonl")
    want = [
        reward(model, folder, their_input(folder, picture(size, i), prompt, response))
        for i, (size, prompt) in enumerate(zip(SIZES, PROMPTS))
        for response in RESPONSES
    ]
    assert len(set(want)) == len(want)
    np.testing.assert_allclose(scores, want, rtol=0, atol=1e-5 * np.abs(want).max())


def scored(folder: Path, rows: Path, out: Path) -> list[float]:
    console = Console(quiet=True)
    settings = {"image_root": None, "dtype": "float32", "batch_size": 8, "buckets": 2, "draw_score": None}
    found = score_file(folder, str(rows), out, console=console, **settings)
    assert found["errors"] == 0
    return [json.loads(line)["score"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_run_exported(capsys, dtype: str, tmp_path: Path) -> None:
    """Trained from a `*-hf` folder with a head of its own, exported, and loaded by transformers."""
    base, run_folder, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    before = save_native(base, "qwen2", tied=False)
    file = write_pairs(tmp_path, "pairs", 8)
    settings = [a.replace("--train.", "--") for a in FAST]
    train = ("train", "--data", file, "--out", run_folder, "--model", base, "--steps", 2, "--data.holdout", 0)
    status, text = run(capsys, *train, "--optimizer.learning-rate", 0.01, *settings)
    assert status == 0, text
    status, text = run(capsys, "export", "--run", run_folder, "--out", out, "--dtype", dtype)
    assert status == 0 and f"native layout, {dtype}" in " ".join(text.split()), text
    model, info = InternVLForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert model.dtype == getattr(torch, dtype)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"score.weight"}
    head = before.lm_head.weight.to(model.dtype)
    assert torch.equal(model.lm_head.weight, head)
    trained, base_state = model.state_dict(), before.state_dict()
    changed = {key for key, x in trained.items() if not torch.equal(x, base_state[key].to(model.dtype))}
    assert any("language_model" in key for key in changed) and "lm_head.weight" not in changed
    # What the run holds is what transformers has, to the last bit of the exported type.
    saved = read_run(run_folder)
    state, _ = saved.restore(Console(quiet=True))
    want = merge_branch(state.params[saved.program.objective.scores], state.frozen)["decoder"]["embedding"]
    want = torch.tensor(np.asarray(want.get_value())).to(model.dtype)
    assert torch.equal(model.get_input_embeddings().weight, want)
    # Tokenizer and image processor are still those of the base, for transformers too.
    assert AutoTokenizer.from_pretrained(out).get_vocab() == make_tokenizer().get_vocab()
    model = model.float().eval()
    scores = scored(out, file, tmp_path / "scores.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rewards = [
        reward(model, out, their_input(out, Image.open(tmp_path / row["img_path"]), row["prompt"], row[which]))
        for row in rows
        for which in ("chosen", "rejected")
    ]
    np.testing.assert_allclose(scores, rewards, rtol=0, atol=1e-5 * np.abs(rewards).max())
    config = open_checkpoint(out).config
    assert load_params(out, config, abstract_model(config)[1])[1] == []
