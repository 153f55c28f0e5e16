"""Formats whose rows are conversations: lists of turns, each with a speaker and a text.

The last turn before the answer is the prompt, those before it its history: the user's and the assistant's in turn. A
system message is refused: the checkpoint's chat template has its own.
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
    count_places,
    misplaced,
    pictures,
    places_first,
    take,
    turns_in_place,
)
from mmrm_jax.data.formats.pairs import history
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
    images = pictures(row)
    both = ((chosen, "conversations"), (rejected, "rejected_conversations"))
    asked, other = (places_first(_asked(turns[:-1], name), len(images)) for turns, name in both)
    if [field.value for field in asked] != [field.value for field in other]:
        raise RowError("different prompts: 'conversations' and 'rejected_conversations' do not ask the same")
    answers = (_answer(chosen, "conversations"), _answer(rejected, "rejected_conversations"))
    return _record(asked, images, answers)


def read_llava(row: Row) -> Record:
    """LLaVA preferences: `id, image, conversations [{from, value}], output_1 {value}, output_2 {value}, preference`."""
    images = pictures(row)
    asked = places_first(_asked(turns(take(row, "conversations")), "conversations"), len(images))
    return _record(asked, images, (_said(row, "output_1"), _said(row, "output_2")))


def read_llama_factory(row: Row) -> Record:
    """LLaMA-Factory: `conversations [{from, value}], chosen {from, value}, rejected {from, value}, images`."""
    images = pictures(row, optional=True)
    asked = turns_in_place(_asked(turns(take(row, "conversations")), "conversations"), len(images))
    if images and not count_places([field.value for field in asked]):
        raise misplaced(asked[-1].name, 0, len(images))
    return _record(asked, images, (_said(row, "chosen"), _said(row, "rejected")))


def read_ms_swift(row: Row) -> Record:
    """ms-swift: `messages`, the last of which is the chosen response, and `rejected_response` or `rejected_messages`.

    `rejected_response` may be a list of several; `images` stand at the `<image>` of the user's messages.
    `rejected_images` may only repeat them: a group has one list of images.
    """
    if row.get("rejected_images") not in (None, [], row.get("images")):
        raise RowError(
            "images differ: 'rejected_images' gives the rejected response images of its own, which are not compared; "
            "leave the row out"
        )
    images = pictures(row, optional=True)
    messages = turns(take(row, "messages"))
    asked = turns_in_place(_asked(messages[:-1], "messages"), len(images))
    return _record(asked, images, (_answer(messages, "messages"), *_rejected(row, messages)))


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
        return Record(take(row, "prompt"), images, tuple(take(row, name) for name in names), history(row))
    chosen, rejected = (turns(take(row, name)) for name in names)
    before, asked = row.get("prompt"), []
    if isinstance(before, str):
        asked = [Field("prompt", before)]
    elif before is not None:
        asked = _spelt(_asked(turns(take(row, "prompt")), "prompt"), len(images))
    else:
        shared = _shared(chosen, rejected)
        asked = _spelt(_asked(chosen[:shared], "chosen"), len(images))
        chosen, rejected = chosen[shared:], rejected[shared:]
    both = ((chosen, "chosen"), (rejected, "rejected"))
    return _record(asked, images, tuple(_spelt([_only(answer, name)], 0)[0] for answer, name in both))


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


def _record(asked: Sequence[Field], images: tuple[Field, ...], responses: tuple[Field, ...]) -> Record:
    return Record(asked[-1], images, responses, tuple(asked[:-1]))


def _asked(asked: Sequence[Turn], name: str) -> list[Field]:
    """The contents of the turns before the answer, of the user and the assistant in turn; the last is the prompt."""
    if not asked:
        raise RowError(f"no prompt: '{name}' has no turn before the answer; the user's must be there")
    for i, turn in enumerate(asked):
        speaker = ("user", "assistant")[i % 2]
        if turn.speaker != speaker:
            system = "; the chat template has its own: leave it out" if turn.speaker == "system" else ""
            raise RowError(
                f"wrong speaker: turn {i + 1} of '{name}' is of {str(turn.speaker)!r:.50}; it must be the {speaker}'s "
                f"({'human' if i % 2 == 0 else 'gpt'}){system}"
            )
    if len(asked) % 2 == 0:
        raise RowError(f"wrong speaker: '{name}' has two turns of the assistant at its end; the first asks nothing")
    return [turn.content for turn in asked]


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


def _spelt(contents: Sequence[Field], images: int) -> list[Field]:
    """The texts of messages, which say in their parts where all of so many images stand, or nowhere."""
    found = [_joined(content) for content in contents]
    places, others = (sum(places for _, places in part) for part in (found[::2], found[1::2]))
    if places not in (0, images) or others:
        raise misplaced(contents[-1].name, places, images, others)
    return [field for field, _ in found]


def _joined(content: Field) -> tuple[Field, int]:
    """The text of a message, whose parts are joined, with `<image>` on a line of its own for each image part; and how
    many there are."""
    parts = content.value
    if not isinstance(parts, list):
        return content, 0
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
    if places and text.count(IMAGE_PLACEHOLDER) > places:
        raise RowError(
            f"image place in a text: a text part of '{content.name}' says {IMAGE_PLACEHOLDER}, and image parts stand "
            "beside it; which is the image's place cannot be told: leave it out of the text"
        )
    return Field(content.name, text), places
