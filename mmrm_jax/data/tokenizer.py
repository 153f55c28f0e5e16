"""Tokenizers of checkpoint folders, read without running any of their code.

`tokenizer.json` is what the `tokenizers` library reads itself. Older checkpoints come with the files of a tokenizer
written in Python: a SentencePiece model (`tokenizer.model`: InternLM2, Llama, Phi-3) or `vocab.json` and `merges.txt`
(Qwen2), and tokens added to either, in `tokenizer_config.json`, `added_tokens.json` or `special_tokens_map.json`. They
give the ids that those tokenizers give (transformers 4.44), which differ from a converted `tokenizer.json` in small
ways, such as the space that some put before every text after a special token.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mmrm_jax.data.folder import read_object, read_optional, why
from mmrm_jax.data.sentencepiece import SPACE, build_tokenizer, read_sentencepiece

# Everything that says how a checkpoint turns text into ids.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)

# Qwen2's: contractions, words with one leading space or mark, single digits, punctuation, white space.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ROLES = (
    *(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    "additional_special_tokens",
)

_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer for the texts between special tokens, and what it takes to put a conversation together.

    Attributes:
        tokenizer: Encodes one text.
        start: Ids that open every conversation (the beginning-of-sequence token, or none).
        opening: What is put before a text that opens a conversation, ...
        inner: ... and before any other text: a space, in the spelling of the model, or nothing.
        listed: The tokens that the files name as special, before which nothing opens a conversation. A flag of an added
            token alone does not make it one of them.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...] = ()
    opening: str = ""
    inner: str = ""
    listed: frozenset[str] = frozenset()


def read_vocabulary(path: Path) -> Vocabulary:
    """Read the tokenizer of a checkpoint folder.

    Raises ValueError naming the file that is missing, damaged or not supported.
    """
    if (path / "tokenizer.json").exists():
        return _read_json(path)
    if (path / "tokenizer.model").exists():
        return _read_sentencepiece(path)
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return _read_qwen2(path)
    raise ValueError(
        f"{path / 'tokenizer.json'} does not exist, nor does tokenizer.model, or vocab.json with merges.txt: a "
        "checkpoint needs the files of its tokenizer"
    )


def qwen2_tokenizer(model: models.BPE) -> Tokenizer:
    """Byte-level BPE with the normalisation and the words of Qwen2."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def plain_text_only(tokenizer: Tokenizer, special: Iterable[str]) -> None:
    """Make `tokenizer` read text as text: it finds none of its special tokens there, `special` among them."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for name in special:
        token = known.get(name, AddedToken(name, normalized=False))
        if not token.special:
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip}
            tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True, **flags)])
    tokenizer.encode_special_tokens = True


def _read_json(path: Path) -> Vocabulary:
    file = path / "tokenizer.json"
    data = read_object(file)
    # A space before the first text alone: we tokenise text by text, so each would be the first. Where a conversation
    # opens with text at all, that text (of the template) has a space of its own, which is not doubled.
    for part in _parts(data.get("pre_tokenizer")):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_optional(path / "tokenizer_config.json")
    for i, token in sorted(_added_tokens(path, config).items()):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != i:
            raise ValueError(f"{file}: token {token.content!r} has the id {found}, but {i} in the files beside it")
    if isinstance(config.get("add_bos_token"), bool):
        return Vocabulary(tokenizer, _start(path, config, tokenizer))
    sample = tokenizer.encode("a")
    opened = itertools.takewhile(lambda pair: pair[1], zip(sample.ids, sample.special_tokens_mask, strict=True))
    return Vocabulary(tokenizer, tuple(i for i, _ in opened))


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer of `tokenizer.json`, or those that it is a sequence of."""
    if isinstance(part, dict):
        yield part
        for inner in part.get("pretokenizers", ()):
            yield from _parts(inner)


def _read_sentencepiece(path: Path) -> Vocabulary:
    model = read_sentencepiece(path / "tokenizer.model")
    config = read_optional(path / "tokenizer_config.json")
    tokenizer = build_tokenizer(model, _added_tokens(path, config))
    start = _start(path, {"add_bos_token": True, "bos_token": "<s>"} | config, tokenizer)
    # Llama's tokenizer, where `legacy` is false, puts the space before the whole conversation and no longer before
    # each of its texts; which it does whatever the model itself says.
    if config.get("legacy") is False:
        opening = SPACE if config.get("add_prefix_space", True) else ""
        return Vocabulary(tokenizer, start, opening=opening, listed=_listed(path, config))
    space = SPACE if model.dummy_prefix else ""
    return Vocabulary(tokenizer, start, opening=space, inner=space)


def _read_qwen2(path: Path) -> Vocabulary:
    config = read_optional(path / "tokenizer_config.json")
    kind = config.get("tokenizer_class", _QWEN2_CLASSES[0])
    if kind not in _QWEN2_CLASSES:
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: tokenizer_class {kind!r} is not supported with vocab.json, only "
            f"{_QWEN2_CLASSES[0]}; put the tokenizer's tokenizer.json beside it"
        )
    file, added = path / "vocab.json", _added_tokens(path, config)
    vocabulary = {str(token): i for token, i in read_object(file).items()}
    vocabulary |= {token.content: i for i, token in added.items()}
    if any(not isinstance(i, int) or i < 0 for i in vocabulary.values()):
        raise ValueError(f"{file}: ids must be integers from 0 on")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{file}: two tokens have the same id, the added ones counted")
    merges = _read_merges(path / "merges.txt")
    try:
        tokenizer = qwen2_tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} and merges.txt do not fit together: {error}") from error
    tokenizer.add_tokens(list(added.values()))
    return Vocabulary(tokenizer, _start(path, config, tokenizer))


def _read_merges(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {why(error)}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version:")):
            continue
        left, *rest = line.split()
        if len(rest) != 1:
            raise ValueError(f"{file} line {number}: a merge is two tokens with a space between, not {line!r}")
        merges.append((left, rest[0]))
    return merges


def _added_tokens(path: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens beside the vocabulary proper, by id. Raises ValueError where the files disagree or are malformed."""
    tokens: dict[int, AddedToken] = {}
    file = path / "tokenizer_config.json"
    try:
        for i, fields in config.get("added_tokens_decoder", {}).items():
            tokens[int(i)] = _added_token(fields, special=False)
        file = path / "special_tokens_map.json"
        special = {token.content: token for token in _special_tokens(read_optional(file))}
        file = path / "added_tokens.json"
        ids = {token.content: i for i, token in tokens.items()}
        for content, i in read_optional(file).items():
            if ids.get(content, i) != i or (i in tokens and tokens[i].content != content):
                raise ValueError(f"token {content!r} with id {i} is another in tokenizer_config.json")
            tokens.setdefault(int(i), special.get(content) or _added_token(content, special=False))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: the added tokens cannot be read: {error!r}") from error
    return tokens


def _listed(path: Path, config: Mapping[str, Any]) -> frozenset[str]:
    """The special tokens by their roles: `special_tokens_map.json` counts where there is no `added_tokens_decoder`."""
    file, found = path / "tokenizer_config.json", set()
    try:
        found |= {t.content for t in _special_tokens({k: v for k, v in config.items() if k in _ROLES and v})}
        if "added_tokens_decoder" not in config:
            file = path / "special_tokens_map.json"
            found |= {t.content for t in _special_tokens(read_optional(file))}
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: the special tokens cannot be read: {error!r}") from error
    return frozenset(found)


def _special_tokens(names: Mapping[str, Any]) -> Iterator[AddedToken]:
    for value in names.values():
        for one in value if isinstance(value, list) else [value]:
            yield _added_token(one, special=True)


def _added_token(fields: str | Mapping[str, Any], *, special: bool) -> AddedToken:
    """One token in the files' notation. It is matched in the text as written, as the Python tokenizers do."""
    if isinstance(fields, str):
        return AddedToken(fields, normalized=False, special=special)
    flags = {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(fields["content"], normalized=False, special=bool(fields.get("special", special)), **flags)


def _start(path: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The beginning-of-sequence token, where `add_bos_token` asks for it."""
    if not config.get("add_bos_token"):
        return ()
    named = config.get("bos_token") or read_optional(path / "special_tokens_map.json").get("bos_token")
    name = named.get("content") if isinstance(named, dict) else named
    found = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"{path / 'tokenizer_config.json'}: bos_token {name!r} is not in the vocabulary")
    return (found,)
