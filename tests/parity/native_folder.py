"""A checkpoint folder as `*-hf` repositories ship one: everything in it is written by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from test_templates import NATIVE
from tokenizers import AddedToken
from torch_models import make_model
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from mmrm_jax.tiny.tokenizer import END_OF_TEXT, END_OF_TURN, train_tokenizer

TILE, TOKENS_PER_TILE = 12, 9
MEAN, STD = [0.5, 0.25, 0.375], [0.25, 0.5, 0.3]
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# How transformers has written processors over time: settings of images in a file of their own, or with the rest.
Era = Literal["4", "5"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Added tokens beside those of images, as InternVL has them, some of them not special."""
    trained = train_tokenizer()
    trained.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<quad>", "<ref>", "<video>")])
    trained.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<think>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token=END_OF_TURN, pad_token=END_OF_TEXT, extra_special_tokens=IMAGE_TOKENS
    )
    tokenizer.chat_template = NATIVE.replace("'<IMG_CONTEXT>\n' }}", "'<IMG_CONTEXT>\n' }}{% elif false %}")
    return tokenizer


def image_processor(max_patches: int = 6) -> GotOcr2ImageProcessorPil:
    size = {"height": TILE, "width": TILE}
    return GotOcr2ImageProcessorPil(size=size, image_mean=MEAN, image_std=STD, max_patches=max_patches)


def save_native(folder: Path, name: str, *, era: Era = "5", tied: bool = True) -> InternVLForConditionalGeneration:
    """The folder, with a score head, and its model."""
    tokenizer, images = make_tokenizer(), image_processor()
    model = make_model(
        name,
        tied=tied,
        vision={"image_size": [TILE, TILE]},
        text={"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 512},
        image_seq_length=TOKENS_PER_TILE,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.randn(1, model.config.text_config.hidden_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": TOKENS_PER_TILE}
    if era == "4":
        images.save_pretrained(folder)
    else:
        processor["image_processor"] = images.to_dict()
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return model
