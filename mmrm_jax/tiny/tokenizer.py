"""The tiny model's tokenizer: a small byte-level BPE in the manner of Qwen2, trained in seconds, always the same.

It learns the shapes world's sentences and the general English words of `words.txt`, so that ordinary English needs
less than two tokens a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from mmrm_jax.data.shapes import make_caption
from mmrm_jax.data.tokenizer import qwen2_tokenizer

VOCABULARY_SIZE = 2048
MODEL_MAX_LENGTH = 4096
END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
# In the order of their ids, after the learnt vocabulary.
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<img>", "</img>", "<IMG_CONTEXT>")

_CAPTION_SEED = 2025
_CAPTIONS = 2000


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer; every call gives the same one, with `VOCABULARY_SIZE` tokens in all."""
    tokenizer = qwen2_tokenizer(models.BPE())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def training_texts() -> Iterator[str]:
    """Captions of the shapes world, then each word of `words.txt`, the frequent ones (listed first) more often."""
    for index in range(_CAPTIONS):
        caption = make_caption(_CAPTION_SEED, index)
        yield caption.prompt
        yield caption.answer
    words = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()
    for rank, word in enumerate(words):
        # Zipf's law, flattened: a word in the middle of the list must still be worth a token of its own.
        yield f" {word}" * (20 + 20000 // (rank + 100))
        yield f"{word.capitalize()}\n" * (2 + 600 // (rank + 100))


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` in the Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (END_OF_TURN, END_OF_TEXT)],
    }
    config = {
        **special,
        "tokenizer_class": "Qwen2TokenizerFast",
        "model_max_length": MODEL_MAX_LENGTH,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "unk_token": None,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
