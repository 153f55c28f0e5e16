"""Folders with the tokenizer files of each kind, small and made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from mmrm_jax.data.sentencepiece import _message_class
from mmrm_jax.tiny.tokenizer import save_tokenizer

IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", *IMAGE_TOKENS)
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6

WORDS = ("▁the", "the", "th", "▁t", "he", "▁a", "an", "and", "▁an", "▁and", "in", "ing", "▁▁", "▁▁▁▁", "aa", "aaa")
WORDS = (
    *WORDS,
    "us",
    "er",
    "user",
    "as",
    "ss",
    "is",
    "st",
    "sy",
    "12",
    "</",
    "s>",
    "</s",
    "<s",
    "0x",
    "é",
    "ca",
    "cat",
)


def sentencepiece_bytes(
    words: tuple[str, ...] = WORDS, *, extra: tuple[tuple[str, int], ...] = (), **options: object
) -> bytes:
    """A BPE model: <unk>, <s>, </s>, bytes, `extra` pieces of a given type, words and the characters of words."""
    model = _message_class("Model")()
    normal = list(dict.fromkeys([*words, *sorted(set("".join(words)) | set("▁abcdefghijklmnop"))]))
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces = [*special, *((f"<0x{i:02X}>", BYTE) for i in range(256)), *extra]
    for text, kind in pieces:
        model.pieces.add(piece=text, score=0.0, type=kind)
    for rank, text in enumerate(normal):
        model.pieces.add(piece=text, score=-float(rank), type=1)
    model.trainer_spec.model_type = options.pop("model_type", 2)
    model.trainer_spec.byte_fallback = options.pop("byte_fallback", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    for name, value in options.items():
        setattr(model.normalizer_spec, name, value)
    return model.SerializeToString()


def save_sentencepiece(
    folder: Path, tokens: tuple[str, ...], *, rstrip: bool = False, config: dict | None = None, **options: object
) -> Path:
    """A Llama-like folder whose added tokens follow the model's pieces; `rstrip` as Phi-3's role tokens have it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = sentencepiece_bytes(**options)
    (folder / "tokenizer.model").write_bytes(data)
    model = _message_class("Model")()
    model.ParseFromString(data)
    first = len(model.pieces)
    decoder = {
        str(first + i): {"content": t, "special": True, "rstrip": rstrip and t not in IMAGE_TOKENS}
        for i, t in enumerate(tokens)
    }
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "added_tokens_decoder": decoder}
    settings["additional_special_tokens"] = list(tokens)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | (config or {})))
    return folder


def save_json(folder: Path, tokenizer: Tokenizer) -> Path:
    save_tokenizer(tokenizer, folder)
    return folder


def save_vocabulary(folder: Path, tokenizer: Tokenizer) -> Path:
    """The same tokenizer as Qwen2's Python tokenizer keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(tokenizer.to_str())
    added = {t["content"]: t["id"] for t in data["added_tokens"]}
    vocabulary = {t: i for t, i in data["model"]["vocab"].items() if t not in added}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{left} {right}\n" for left, right in data["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    special = {"pad_token": "<|endoftext|>", "additional_special_tokens": [t for t in added if t != "<|endoftext|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    return folder
