"""SentencePiece models (`tokenizer.model`) as BPE of the `tokenizers` library, without the sentencepiece package.

The file is a protocol buffer of github.com/google/sentencepiece (src/sentencepiece_model.proto, Apache-2.0). Only the
fields that decide the ids of a text are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from mmrm_jax.data.folder import why

SPACE = "▁"  # U+2581 stands for a space inside a model

_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2
_TYPES = {
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "float": FieldDescriptorProto.TYPE_FLOAT,
    "int32": FieldDescriptorProto.TYPE_INT32,
}
# message -> (field, number, type); the pieces are many.
_SCHEMA = {
    "Piece": (("piece", 1, "string"), ("score", 2, "float"), ("type", 3, "int32")),
    "TrainerSpec": (("model_type", 3, "int32"), ("byte_fallback", 35, "bool"), ("unk_piece", 45, "string")),
    "NormalizerSpec": (
        ("precompiled_charsmap", 2, "bytes"),
        ("add_dummy_prefix", 3, "bool"),
        ("remove_extra_whitespaces", 4, "bool"),
        ("escape_whitespaces", 5, "bool"),
    ),
    "Model": (("pieces", 1, "Piece"), ("trainer_spec", 2, "TrainerSpec"), ("normalizer_spec", 3, "NormalizerSpec")),
}
_DEFAULTS = {
    "type": "1",
    "model_type": "1",
    "unk_piece": "<unk>",
    "add_dummy_prefix": "true",
    "remove_extra_whitespaces": "true",
    "escape_whitespaces": "true",
}


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """What a model file says: pieces as (text, score, type), and how a text is prepared."""

    pieces: tuple[tuple[str, float, int], ...]
    byte_fallback: bool
    unknown: str
    dummy_prefix: bool


def read_sentencepiece(file: Path) -> SentencePiece:
    """Read a BPE model whose normaliser is the identity, as those of Llama, InternLM2 and Phi-3 are.

    Raises ValueError naming the file where it is no such model.
    """
    model = _message_class("Model")()
    try:
        model.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(f"{file} cannot be read as a SentencePiece model: {why(error)}") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces:
        raise ValueError(f"{file} cannot be read as a SentencePiece model: it has no pieces")
    unsupported = {
        f"trainer_spec.model_type {trainer.model_type} (only BPE, {_BPE}, is)": trainer.model_type != _BPE,
        "normalizer_spec.precompiled_charsmap": bool(normalizer.precompiled_charsmap),
        "normalizer_spec.remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "normalizer_spec.escape_whitespaces false": not normalizer.escape_whitespaces,
    }
    for what, found in unsupported.items():
        if found:
            raise ValueError(f"{file}: {what} is not supported; put the tokenizer's tokenizer.json beside it")
    pieces = tuple((p.piece, p.score, p.type) for p in model.pieces)
    _check_characters(file, pieces)
    return SentencePiece(pieces, trainer.byte_fallback, trainer.unk_piece, normalizer.add_dummy_prefix)


def _check_characters(file: Path, pieces: Iterable[tuple[str, float, int]]) -> None:
    normal = {text for text, _, kind in pieces if kind == _NORMAL}
    characters = {text for text in normal if len(text) == 1}
    bad = next((text for text in sorted(normal) if not characters.issuperset(text)), None)
    if bad is not None:
        raise ValueError(f"{file}: piece {bad!r} is made of characters that are no pieces, so no merges lead to it")


def build_tokenizer(model: SentencePiece, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The tokenizer of a model and the tokens added to it, by id; it puts no space before a text.

    An added token takes over the piece of its id (InternLM2 renames pieces it kept in reserve), which text then no
    longer yields. User-defined pieces are matched as they stand before anything is merged.
    """
    taken = {token.content for token in added.values()}
    own = {text: i for i, (text, _, _) in enumerate(model.pieces) if i not in added and text not in taken}
    vocabulary = own | {token.content: i for i, token in added.items()}
    normal = [(text, score) for text, score, kind in model.pieces if kind == _NORMAL and text in own]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(normal, own),
            unk_token=model.unknown if model.unknown in vocabulary else None,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=False)
            for text, _, kind in model.pieces
            if kind == _USER_DEFINED and text in own
        ]
    )
    tokenizer.add_tokens(list(added.values()))
    return tokenizer


def _merges(normal: list[tuple[str, float]], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the highest score first, as SentencePiece merges.

    Control and byte pieces take no part: no text yields them.
    """
    names = {text for text, _ in normal}
    merges = []
    for text, _ in sorted(normal, key=lambda piece: (-piece[1], ids[piece[0]])):
        halves = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [(left, right) for left, right in halves if left in names and right in names]
    return merges


def _message_class(name: str) -> Any:
    file = FileDescriptorProto(name="sentencepiece_subset.proto", package="mmrm", syntax="proto2")
    for message, fields in _SCHEMA.items():
        described = file.message_type.add(name=message)
        for field, number, kind in fields:
            added = described.field.add(name=field, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
            added.type = _TYPES.get(kind, FieldDescriptorProto.TYPE_MESSAGE)
            if kind not in _TYPES:
                added.type_name = f".mmrm.{kind}"
            if kind == "Piece":
                added.label = FieldDescriptorProto.LABEL_REPEATED
            if field in _DEFAULTS:
                added.default_value = _DEFAULTS[field]
    pool = descriptor_pool.DescriptorPool()  # its own: the default one may know the whole schema
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mmrm.{name}"))
