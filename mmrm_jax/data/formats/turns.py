"""Formats whose rows are conversations: lists of turns, each with a speaker and a text.

A prompt is one turn of the user. Rows with more before the answer are refused, for a prompt of several turns would have
to be spelt as the checkpoint's chat template spells them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmrm_jax.data.formats.fields import (
    Field,
    Record,
    Row,
    RowError,
    check_list,
    in_place,
    misplaced,
    pictures,
    take,
    without_places,
)
from mmrm_jax.data.templates import IMAGE_PLACEHOLDER

_SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Turn:
    """Who speaks ("user", "assistant", "system", ...), and what: `content` is a text or, in TRL, a list of parts."""

    speaker: Any
    content: Field


def read_povid(row: Row) -> Record:
    """POVID: `id, image, conversations [{from, value}], rejected_conversations` of the same shape."""
    chosen = turns(take(row, "conversations"))
    rejected = turns(take(row, "rejected_conversations"))
    asked = without_places(_asked(chosen[:-1], "conversations"))
    if without_places(_asked(rejected[:-1], "rejected_conversations")).value != asked.value:
        raise RowError("different prompts: 'conversations' and 'rejected_conversations' do not ask the same")
    answers = (_answer(chosen, "conversations"), _answer(rejected, "rejected_conversations"))
    return Record(asked, pictures(row), answers)


def read_llava(row: Row) -> Record:
    """LLaVA preferences: `id, image, conversations [{from, value}], output_1 {value}, output_2 {value}, preference`."""
    asked = without_places(_asked(turns(take(row, "conversations")), "conversations"))
    return Record(asked, pictures(row), (_said(row, "output_1"), _said(row, "output_2")))


def read_llama_factory(row: Row) -> Record:
    """LLaMA-Factory: `conversations [{from, value}], chosen {from, value}, rejected {from, value}, images`."""
    images = pictures(row, optional=True)
    asked = _asked(turns(take(row, "conversations")), "conversations")
    prompt = in_place(asked, len(images))
    if images and IMAGE_PLACEHOLDER not in prompt.value:
        raise misplaced(asked.name, 0, len(images))
    return Record(prompt, images, (_said(row, "chosen"), _said(row, "rejected")))


def read_ms_swift(row: Row) -> Record:
    """ms-swift: `messages`, the last of which is the chosen response, and `rejected_response` or `rejected_messages`.

    `rejected_response` may be a list of several; `images` stand at the `<image>` of the prompt.
    """
    if row.get("rejected_images"):
        raise RowError(
            "images differ: 'rejected_images' gives the rejected response images of its own, which are not compared; "
            "leave the row out"
        )
    images = pictures(row, optional=True)
    messages = turns(take(row, "messages"))
    asked = in_place(_asked(messages[:-1], "messages"), len(images))
    return Record(asked, images, (_answer(messages, "messages"), *_rejected(row, messages)))


def _rejected(row: Row, messages: Sequence[Turn]) -> list[Field]:
    if row.get("rejected_messages") is not None:
        rejected = turns(take(row, "rejected_messages"))
        if [turn.content.value for turn in rejected[:-1]] != [turn.content.value for turn in messages[:-1]]:
            raise RowError("different prompts: 'messages' and 'rejected_messages' do not ask the same")
        return [_answer(rejected, "rejected_messages")]
    one = take(row, "rejected_response")
    if not isinstance(one.value, list):
        return [one]
    return [Field(f"{one.name}[{i}]", text) for i, text in enumerate(check_list(one, "texts"))]


def read_trl(row: Row) -> Record:
    """TRL: `images` or `image`, and `prompt, chosen, rejected` as texts or lists of messages.

    A message's `content` is a text or parts, `{"type": "image"}` and `{"type": "text", "text"}`. Without a `prompt`, it
    is the turns that `chosen` and `rejected` begin with alike.
    """
    images = pictures(row, optional=True)
    names = ("chosen", "rejected")
    if not all(isinstance(row[name], list) for name in names):
        return Record(take(row, "prompt"), images, tuple(take(row, name) for name in names))
    chosen, rejected = (turns(take(row, name)) for name in names)
    asked = row.get("prompt")
    if isinstance(asked, str):
        prompt = Field("prompt", asked)
    elif asked is not None:
        prompt = _joined(_asked(turns(take(row, "prompt")), "prompt"), len(images))
    else:
        shared = _shared(chosen, rejected)
        prompt = _joined(_asked(chosen[:shared], "chosen"), len(images))
        chosen, rejected = chosen[shared:], rejected[shared:]
    answers = (_joined(_only(answer, name), 0) for answer, name in ((chosen, "chosen"), (rejected, "rejected")))
    return Record(prompt, images, tuple(answers))


def is_trl(row: Row) -> bool:
    """Whether a row of chosen and rejected is TRL's, and no flat pair with one image."""
    return "images" in row or isinstance(row["chosen"], list)


# ---- turns


def turns(field: Field) -> list[Turn]:
    """The turns in a field: `{"role", "content"}` or `{"from", "value"}` each."""
    found = []
    for i, turn in enumerate(check_list(field, "turns")):
        name = f"{field.name}[{i}]"
        names = next((p for p in (("role", "content"), ("from", "value")) if _has(turn, p)), None)
        if names is None:
            there = f"has {', '.join(sorted(turn)) or 'no fields'}" if isinstance(turn, dict) else "is no object"
            raise RowError(f"no turn: '{name}' {there}; a turn must have 'role' and 'content', or 'from' and 'value'")
        speaker = turn[names[0]]
        content = Field(f"{name}.{names[1]}", turn[names[1]])
        found.append(Turn(_SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, content))
    return found


def _has(turn: Any, names: tuple[str, str]) -> bool:
    return isinstance(turn, dict) and all(name in turn for name in names)


def _asked(asked: Sequence[Turn], name: str) -> Field:
    """The prompt: the content of the only turn before the answer."""
    speakers = ", ".join(str(turn.speaker) for turn in asked)
    if len(asked) != 1:
        raise RowError(
            f"not one turn: '{name}' has {len(asked)} turns before the answer ({speakers or 'none'}); a prompt is one "
            "turn of the user: put what matters into it, or leave the row out"
        )
    if asked[0].speaker != "user":
        raise RowError(f"wrong speaker: '{name}' begins with a turn of {speakers!r:.50}; it must be the user's (human)")
    return asked[0].content


def _answer(all_turns: Sequence[Turn], name: str) -> Field:
    """The content of the last turn, which must be the assistant's."""
    if all_turns[-1].speaker != "assistant":
        raise RowError(
            f"wrong speaker: '{name}' ends with a turn of {str(all_turns[-1].speaker)!r:.50}; it must be the "
            "assistant's (gpt)"
        )
    return all_turns[-1].content


def _only(answer: Sequence[Turn], name: str) -> Field:
    if len(answer) != 1:
        raise RowError(f"not one turn: '{name}' has {len(answer)} turns after the prompt; a response is one turn")
    return _answer(answer, name)


def _shared(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    """How many turns both begin with."""
    both = zip(chosen, rejected, strict=False)
    same = [a.speaker == b.speaker and a.content.value == b.content.value for a, b in both]
    return next((i for i, equal in enumerate(same) if not equal), len(same) - 1)


def _said(row: Row, name: str) -> Field:
    """The text of a response that is a turn, `{"from", "value"}` or `{"role", "content"}`, or the text itself."""
    field = take(row, name)
    if not isinstance(field.value, dict):
        return field
    inner = next((inner for inner in ("value", "content") if inner in field.value), None)
    if inner is None:
        return Field(name, RowError(f"missing field: '{name}' has no 'value'; it has {', '.join(sorted(field.value))}"))
    return Field(f"{name}.{inner}", field.value[inner])


def _joined(content: Field, images: int) -> Field:
    """The text of a message, whose parts are joined, with `<image>` on a line of its own for each image part."""
    parts = content.value
    if not isinstance(parts, list):
        return content
    text, places = "", 0
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            places += 1
            text += "\n" * bool(text and not text.endswith("\n")) + IMAGE_PLACEHOLDER + "\n" * (i < len(parts) - 1)
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise RowError(
                f"wrong type: '{content.name}[{i}]' is {part!r:.80}; a part must be {{'type': 'text', 'text': ...}} or "
                "{'type': 'image'}"
            )
    if places not in (0, images):
        raise misplaced(content.name, places, images)
    return Field(content.name, text)
