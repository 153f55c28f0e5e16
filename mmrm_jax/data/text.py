"""Conversations as token ids: one template, one tokenisation, for training, evaluation and serving alike.

Special tokens come from the template only. What users wrote is tokenised as plain text, so a prompt or response
that spells a special token can neither open a turn nor claim an image slot. (The authors' code tokenises the whole
conversation as one string, in which it can; for any other text the ids are the same.)
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mmrm_jax.config import BranchInput
from mmrm_jax.data.templates import (
    IMAGE_CONTEXT,
    TEMPLATES,
    ImageSlots,
    Piece,
    Special,
    Template,
    find_template,
    split_turns,
    without_images,
)
from mmrm_jax.data.tokenizer import TOKENIZER_FILES, Vocabulary, plain_text_only, read_vocabulary

__all__ = ["TEMPLATES", "ChatTokenizer", "Conversation", "GroupTokens", "TextError", "common_prefix", "encode_texts"]


class TextError(ValueError):
    """A conversation that cannot be tokenised within its limits; the message says why."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Token ids of one whole conversation; `visual[i]` is -1 or the index of the visual token at position i."""

    tokens: np.ndarray
    visual: np.ndarray


class ChatTokenizer:
    """Template and vocabulary of one checkpoint; `source` is the folder they were read from, if any.

    Raises ValueError where the vocabulary has not all special tokens of the template and of images.
    """

    def __init__(
        self,
        vocabulary: Tokenizer | Vocabulary,
        template: Template,
        visual_tokens_per_tile: int,
        source: Path | None = None,
    ):
        vocabulary = Vocabulary(vocabulary) if isinstance(vocabulary, Tokenizer) else vocabulary
        self.vocabulary = _settle_opening(vocabulary, template)
        self.tokenizer = self.vocabulary.tokenizer
        self.template = template
        self.visual_tokens_per_tile = visual_tokens_per_tile
        self.source = source
        self._special = {token: self.special_id(token) for token in template.special_tokens}
        self._reserved = frozenset(self._special.values())
        plain_text_only(self.tokenizer, self._special)
        self._flags = {token.content: token for token in self.tokenizer.get_added_tokens_decoder().values()}

    def __reduce__(self) -> tuple[type[ChatTokenizer], tuple[Vocabulary, Template, int, Path | None]]:
        # A pickled tokenizer forgets that it reads text as text; data workers must, too.
        return ChatTokenizer, (self.vocabulary, self.template, self.visual_tokens_per_tile, self.source)

    @classmethod
    def from_pretrained(
        cls, path: Path, visual_tokens_per_tile: int, template: Template | None = None
    ) -> ChatTokenizer:
        """Read a checkpoint's tokenizer and, where none is given, its template; no code from the checkpoint runs.

        Raises ValueError naming the file that is missing, damaged or not supported.
        """
        template = find_template(path) if template is None else template
        vocabulary = read_vocabulary(path)
        try:
            return cls(vocabulary, template, visual_tokens_per_tile, path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write what `from_pretrained` reads: the files the tokenizer came from, or `tokenizer.json` where it is new.

        Files of another tokenizer there are deleted. Raises ValueError where the files it came from are gone.
        """
        path.mkdir(parents=True, exist_ok=True)
        own = {"tokenizer.json"} if self.source is None else {n for n in TOKENIZER_FILES if (self.source / n).exists()}
        for name in set(TOKENIZER_FILES) - own if own else ():
            (path / name).unlink(missing_ok=True)
        if self.source is None:
            self.tokenizer.save(str(path / "tokenizer.json"))
            return
        if not own:
            raise ValueError(f"{self.source} no longer holds the tokenizer that was read from it")
        for name in own:
            if (self.source / name).resolve() != (path / name).resolve():
                shutil.copyfile(self.source / name, path / name)

    def special_id(self, token: str) -> int:
        """The id of a special token; raises ValueError where the vocabulary has none."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}, which the template {self.template.name} needs")
        return found

    def encode(self, pieces: Iterable[Piece], known: dict[str, list[int]] | None = None) -> Conversation:
        """The ids of a whole conversation; `known` saves tokenising a text of several conversations twice.

        Adjacent texts are joined before tokenising, so merges across template borders happen as usual. Raises
        TextError where a text yields a token of the template, which only a damaged vocabulary makes it do.
        """
        known = {} if known is None else known
        tokens = list(self.vocabulary.start)
        slots: list[int] = []
        for position, piece in enumerate(self._trimmed(_joined(pieces))):
            if isinstance(piece, Special):
                tokens.append(self._special[piece.token])
            elif isinstance(piece, ImageSlots):
                slots += range(len(tokens), len(tokens) + piece.count)
                tokens += [self._special[IMAGE_CONTEXT]] * piece.count
            elif piece:
                text = (self.vocabulary.inner if position else self.vocabulary.opening) + piece
                if text not in known:
                    known[text] = self._ids(text)
                tokens += known[text]
        visual = np.full(len(tokens), -1, np.int32)
        visual[slots] = np.arange(len(slots))
        return Conversation(np.asarray(tokens, np.int32), visual)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self._reserved.isdisjoint(ids):
            raise TextError("the vocabulary makes a special token of the chat template out of ordinary text")
        return ids

    def _trimmed(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Texts without the white space that a special token beside them swallows (`rstrip`, `lstrip`: Phi-3)."""
        around = [self._flags[p.token] if isinstance(p, Special) else None for p in pieces]
        for piece, left, right in zip(pieces, [None, *around[:-1]], [*around[1:], None], strict=True):
            if isinstance(piece, str):
                piece = piece.lstrip() if left and left.rstrip else piece
                piece = piece.rstrip() if right and right.lstrip else piece
            yield piece

    def conversation(
        self,
        prompt: str,
        response: str,
        tiles: int | Sequence[int],
        view: BranchInput,
        known: dict[str, list[int]] | None = None,
        history: Sequence[str] = (),
        caption: str | None = None,
    ) -> Conversation:
        """One prompt and response as a branch sees them; `known` is `encode`'s.

        `history` are the turns before the prompt, of the user and the assistant in turn. `tiles` are those of each
        image, a number those of the only one (0: there is none). Images stand where the prompt or the user's turns
        before it say (see `split_turns`). `absent` leaves them out, `blank` puts the one blank tile in the place of
        each, `image_only` leaves out the prompt's text; without images there is one for `blank` alone. A `caption`
        has a line of its own before all turns of a view without images.
        """
        counts = [tiles] * bool(tiles) if isinstance(tiles, int) else list(tiles)
        asked, answers = ([*history[::2], prompt], history[1::2]) if view != "image_only" else ([""], ())
        parts = split_turns(asked, len(counts) or 1)
        if view == "blank":
            counts = [1] * (len(counts) or 1)
        if view == "absent" or not counts:
            counts, parts = [], [(without_images(part),) for part in parts]
            if caption is not None:
                parts[0] = (f"{caption}\n{parts[0][0]}",)
        slots = [count * self.visual_tokens_per_tile for count in counts]
        try:
            pieces = self.template.pieces(parts[-1], slots, response, list(zip(parts, answers, strict=False)))
        except ValueError as error:
            raise TextError(str(error)) from error
        found = self.encode(pieces, known)
        if view == "blank" and len(counts) > 1:
            visual = np.where(found.visual < 0, -1, found.visual % self.visual_tokens_per_tile)
            found = dataclasses.replace(found, visual=visual)
        return found


def _settle_opening(vocabulary: Vocabulary, template: Template) -> Vocabulary:
    """The vocabulary for a template that opens with a token of its own.

    A space for the opening text alone (Llama's tokenizer, `legacy` false) becomes a token by itself there, unless the
    template's token is one that the tokenizer's files list as special.
    """
    first = template.before_prompt[0]
    if not isinstance(first, Special) or not vocabulary.opening or vocabulary.inner:
        return vocabulary
    tokenizer, start = vocabulary.tokenizer, vocabulary.start
    if first.token not in vocabulary.listed:
        start += tuple(tokenizer.encode(vocabulary.opening, add_special_tokens=False).ids)
    return Vocabulary(tokenizer, start)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces with adjacent texts made one, and empty ones left out."""
    out: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and out and isinstance(out[-1], str):
            out[-1] += piece
        elif piece != "":
            out.append(piece)
    return out


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common token prefix, never past the last token of any sequence."""
    shortest = min(len(s) for s in sequences) - 1
    first = sequences[0][:shortest]
    differs = [np.flatnonzero(first != s[:shortest]) for s in sequences[1:]]
    return min([shortest, *(int(d[0]) for d in differs if len(d))])


@dataclasses.dataclass(frozen=True)
class GroupTokens:
    """A group's tokens: per branch the shared prefix, and the responses that all branches share.

    What all responses begin with is part of the prefixes: `opening` tokens of each.
    """

    prefixes: dict[str, Conversation]
    responses: tuple[np.ndarray, ...]
    opening: int


def encode_texts(
    chat: ChatTokenizer,
    prompt: str,
    responses: Sequence[str],
    tiles: int | Sequence[int],
    views: dict[str, BranchInput],
    max_length: int,
    caption: str | None = None,
    history: Sequence[str] = (),
) -> GroupTokens:
    """Tokenise every conversation of a group whole, then split off the longest common prefix per branch.

    `tiles` and `history` are `conversation`'s; the view "caption" has `caption` on a line of its own before the first
    message, and no image. Raises TextError where a conversation is longer than `max_length` tokens, where that view
    lacks its caption, and where the template has one turn alone; nothing is ever truncated.
    """
    prefixes: dict[str, Conversation] = {}
    tails: tuple[np.ndarray, ...] | None = None
    opening = 0
    known: dict[str, list[int]] = {}
    for branch, view in views.items():
        if view == "caption" and caption is None:
            raise TextError("no caption: `caption_only` reads the field 'caption', which says what the image shows")
        view, said = ("absent", caption) if view == "caption" else (view, None)
        encode = functools.partial(chat.conversation, prompt, tiles=tiles, view=view, known=known, history=history)
        whole = []
        for response in responses:  # each is checked before the next one is tokenised
            whole.append(encode(response=response, caption=said))
            if (length := len(whole[-1].tokens)) > max_length:
                raise TextError(f"a conversation has {length} tokens, over the budget of max_length={max_length}")
        split = common_prefix([c.tokens for c in whole])
        if tails is None:
            empty = encode(response="", caption=said)
            opening = split - common_prefix([empty.tokens, *(c.tokens for c in whole)])
        prefixes[branch] = Conversation(whole[0].tokens[:split], whole[0].visual[:split])
        ends = tuple(c.tokens[split:] for c in whole)
        if tails is not None and not all(np.array_equal(a, b) for a, b in zip(tails, ends, strict=True)):
            raise TextError("the branches tokenise the responses differently, so they cannot share them")
        tails = ends
    assert tails is not None
    return GroupTokens(prefixes, tails, opening)
