"""Conversations as token ids: one template, one tokenisation, for training, evaluation and serving alike.

Special tokens come from the template only. What users wrote is tokenised as plain text, so a prompt or response
that spells a special token can neither open a turn nor claim an image slot.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mmrm_jax.config import BranchInput

IMAGE_PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token of the vocabulary, by name."""

    token: str


Piece = Special | str


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format for one user turn and one assistant turn, as pieces around the prompt and the response."""

    before_prompt: tuple[Piece, ...]
    before_response: tuple[Piece, ...]
    after_response: tuple[Piece, ...]


TEMPLATES = {
    "chatml-plain": Template(
        before_prompt=(Special("<|im_start|>"), "user\n"),
        before_response=(Special("<|im_end|>"), Special("<|im_start|>"), "assistant\n"),
        after_response=(Special("<|im_end|>"),),
    )
}


class TextError(ValueError):
    """A conversation that cannot be tokenised within its limits; the message says why."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Token ids of one whole conversation; `visual[i]` is -1 or the index of the visual token at position i."""

    tokens: np.ndarray
    visual: np.ndarray


class ChatTokenizer:
    """Template and vocabulary of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, template: Template, visual_tokens_per_tile: int):
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # text is text: see the module's docstring
        self.template = template
        self.visual_tokens_per_tile = visual_tokens_per_tile

    def __reduce__(self) -> tuple[type[ChatTokenizer], tuple[Tokenizer, Template, int]]:
        # A pickled tokenizer forgets `encode_special_tokens`; data workers must treat text as text, too.
        return ChatTokenizer, (self.tokenizer, self.template, self.visual_tokens_per_tile)

    @classmethod
    def from_pretrained(cls, path: Path, visual_tokens_per_tile: int) -> ChatTokenizer:
        """Read `tokenizer.json` and the template named in `config.json`; no code from the checkpoint runs."""
        name = json.loads((path / "config.json").read_text()).get("template")
        if name not in TEMPLATES:
            raise ValueError(f"{path / 'config.json'}: template {name!r} is not known; known: {', '.join(TEMPLATES)}")
        file = path / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file} does not exist: a checkpoint needs its tokenizer.json")
        return cls(Tokenizer.from_file(str(file)), TEMPLATES[name], visual_tokens_per_tile)

    def special_id(self, token: str) -> int:
        """The id of a special token; raises ValueError where the vocabulary has none."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}, which the chat template needs")
        return found

    def _ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Adjacent texts are joined before tokenising, so merges across template borders happen as usual."""
        ids: list[int] = []
        text = ""
        for piece in (*pieces, None):
            if isinstance(piece, str):
                text += piece
                continue
            if text:
                ids += self.tokenizer.encode(text, add_special_tokens=False).ids
                text = ""
            if piece is not None:
                ids.append(self.special_id(piece.token))
        return ids

    def conversation(self, prompt: str, response: str, tiles: int, view: BranchInput) -> Conversation:
        """One prompt and response as a branch sees them.

        The image stands where the prompt has its first "<image>", else before the prompt on a line of its own.
        """
        t = self.template
        before, placeholder, after = prompt.partition(IMAGE_PLACEHOLDER)
        if not placeholder:
            before, after = "", "\n" + prompt
        if view == "image_only":
            before, after = "", "\n"
        if view == "blank":
            tiles = 1
        if view == "absent" or tiles == 0:
            text = before + after.removeprefix("\n") if not before else before + after
            head = self._ids((*t.before_prompt, text, *t.before_response, response, *t.after_response))
            return Conversation(np.asarray(head, np.int32), np.full(len(head), -1, np.int32))
        slots = tiles * self.visual_tokens_per_tile
        head = self._ids((*t.before_prompt, before, Special("<img>")))
        tail = self._ids((Special("</img>"), after, *t.before_response, response, *t.after_response))
        tokens = [*head, *[self.special_id("<IMG_CONTEXT>")] * slots, *tail]
        visual = np.full(len(tokens), -1, np.int32)
        visual[len(head) : len(head) + slots] = np.arange(slots)
        return Conversation(np.asarray(tokens, np.int32), visual)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common token prefix, never past the last token of any sequence."""
    shortest = min(len(s) for s in sequences) - 1
    first = sequences[0][:shortest]
    differs = [np.flatnonzero(first != s[:shortest]) for s in sequences[1:]]
    return min([shortest, *(int(d[0]) for d in differs if len(d))])


@dataclasses.dataclass(frozen=True)
class GroupTokens:
    """A group's tokens: per branch the shared prefix, and the responses that all branches share."""

    prefixes: dict[str, Conversation]
    responses: tuple[np.ndarray, ...]


def encode_texts(
    chat: ChatTokenizer,
    prompt: str,
    responses: Sequence[str],
    tiles: int,
    views: dict[str, BranchInput],
    max_length: int,
) -> GroupTokens:
    """Tokenise every conversation of a group whole, then split off the longest common prefix per branch.

    Raises TextError where a conversation is longer than `max_length` tokens; nothing is ever truncated.
    """
    prefixes: dict[str, Conversation] = {}
    tails: tuple[np.ndarray, ...] | None = None
    for branch, view in views.items():
        whole = [chat.conversation(prompt, r, tiles, view) for r in responses]
        longest = max(len(c.tokens) for c in whole)
        if longest > max_length:
            raise TextError(f"a conversation has {longest} tokens, over the budget of max_length={max_length}")
        split = common_prefix([c.tokens for c in whole])
        prefixes[branch] = Conversation(whole[0].tokens[:split], whole[0].visual[:split])
        rest = tuple(c.tokens[split:] for c in whole)
        if tails is not None and not all(np.array_equal(a, b) for a, b in zip(tails, rest, strict=True)):
            raise TextError("the branches tokenise the responses differently, so they cannot share them")
        tails = rest
    assert tails is not None
    return GroupTokens(prefixes, tails)
