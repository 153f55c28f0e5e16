"""Chat formats: how one prompt, its image and one response become a sequence of pieces.

A piece is text, a special token or a run of image slots. Special tokens and slots come from here alone; what users
wrote stays text whatever it spells. The formats are those of InternVL's conversation code (github.com/OpenGVLab/
InternVL, MIT licence), which a checkpoint names in `config.json` under `template`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmrm_jax.data.folder import read_object, read_optional, why

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"

# Where a prompt says that its image stands: at its beginning, or alone on a line. In the middle of a line the
# placeholder is text about images, and the authors' code leaves it as it is, too.
_PLACE = re.compile(rf"\A{IMAGE_PLACEHOLDER}|^{IMAGE_PLACEHOLDER}(?=[ \t]*\r?$)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token of the vocabulary, by name."""

    token: str


@dataclasses.dataclass(frozen=True)
class ImageSlots:
    """`count` times `<IMG_CONTEXT>`: the places that visual tokens fill."""

    count: int


Piece = Special | ImageSlots | str


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format, as pieces around the prompt and the response.

    `before_next` stands between a message of the assistant and the user's next one; None where a format has one turn of
    each alone. With `strip` messages lose the white space around them, as InternVL does for InternLM2.
    """

    name: str
    before_prompt: tuple[Piece, ...]
    before_response: tuple[Piece, ...]
    after_response: tuple[Piece, ...]
    strip: bool = False
    before_next: tuple[Piece, ...] | None = None

    def pieces(
        self,
        prompt: Sequence[str],
        slots: Sequence[int],
        response: str,
        history: Sequence[tuple[Sequence[str], str]] = (),
    ) -> tuple[Piece, ...]:
        """The whole conversation; images of so many slots stand between the prompt's parts, one more than images.

        `history` are the turns before, each the parts of the user's message and the assistant's answer; its images come
        first in `slots`. An empty response leaves the assistant's header alone, without its last space and without an
        end of turn. Raises ValueError where the format has no form for several turns.
        """
        if history and self.before_next is None:
            raise ValueError(f"the chat format {self.name} is of one turn; the conversation has {len(history) + 1}")
        counts = iter(slots)
        head = list(self.before_prompt)
        for parts, answer in history:
            said = answer.strip() if self.strip else answer
            head += [*self._message(parts, counts), *self.before_response, said, *(self.before_next or ())]
        head += self._message(prompt, counts)
        if next(counts, None) is not None:
            raise ValueError(f"{len(slots)} images, and fewer places for them")
        response = response.strip() if self.strip else response
        if response:
            return (*head, *self.before_response, response, *self.after_response)
        *header, last = self.before_response
        return (*head, *header, last.removesuffix(" ") if isinstance(last, str) else last)

    def _message(self, parts: Sequence[str], counts: Iterator[int]) -> list[Piece]:
        """A message of the user with its images between its parts."""
        if self.strip:
            first, *rest = parts
            *inner, last = [first.lstrip(), *rest]
            parts = [*inner, last.rstrip()]
        found: list[Piece] = [parts[0]]
        for text in parts[1:]:
            found += [Special(IMAGE_START), ImageSlots(next(counts)), Special(IMAGE_END), text]
        return found

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens of the format and of an image, each once."""
        pieces = (*self.before_prompt, *self.before_response, *self.after_response)
        names = [p.token for p in pieces if isinstance(p, Special)]
        return tuple(dict.fromkeys([*names, IMAGE_START, IMAGE_CONTEXT, IMAGE_END]))


def has_place(prompt: str) -> bool:
    """Whether a prompt says where its only image stands."""
    return _PLACE.search(prompt) is not None


def split_at_images(prompt: str, images: int) -> tuple[str, ...]:
    """The prompt's text before, between and after its images.

    One image stands at the first `<image>` that begins the prompt or is alone on its line. Several stand at as many
    `<image>`, wherever these are, as in InternVL. Elsewhere images come before the prompt, each on a line of its own.
    """
    if images == 1 and (place := _PLACE.search(prompt)):
        return prompt[: place.start()], prompt[place.end() :]
    if images > 1 and prompt.count(IMAGE_PLACEHOLDER) == images:
        return tuple(prompt.split(IMAGE_PLACEHOLDER))
    return ("", *["\n"] * (images - 1), "\n" + prompt) if images else (prompt,)


def split_turns(asked: Sequence[str], images: int) -> list[tuple[str, ...]]:
    """`split_at_images` of the user's messages of a conversation, whose images stand wherever these say."""
    if images > 1 and sum(text.count(IMAGE_PLACEHOLDER) for text in asked) == images:
        return [tuple(text.split(IMAGE_PLACEHOLDER)) for text in asked]
    first = next((i for i, text in enumerate(asked) if images == 1 and _PLACE.search(text)), 0)
    return [split_at_images(text, images if i == first else 0) for i, text in enumerate(asked)]


def without_images(parts: Sequence[str]) -> str:
    """The prompt of these parts without its images, nor the line breaks behind those that it begins with."""
    text = parts[0]
    for part in parts[1:]:
        text += part if text else part.removeprefix("\n")
    return text


def spell(pieces: Iterable[Piece]) -> str:
    """The text that a conversation's pieces spell."""

    def one(piece: Piece) -> str:
        if isinstance(piece, str):
            return piece
        return piece.token if isinstance(piece, Special) else IMAGE_CONTEXT * piece.count

    return "".join(one(piece) for piece in pieces)


_INTERNVL = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _turns(
    name: str,
    roles: tuple[str, str, str],
    end: Sequence[Piece],
    *,
    starts: Sequence[Piece] = (),
    system: str = "",
    strip: bool = False,
) -> Template:
    """A format whose turns are a header of `starts` and the role, a line break, the message and `end`.

    `roles` are those of system, user and assistant; where they are special tokens themselves, `starts` is empty.
    """

    def header(role: str) -> tuple[Piece, ...]:
        return (*starts, role + "\n") if starts else (Special(role), "\n")

    first = (*header(roles[0]), system, *end) if system else ()
    user, assistant = header(roles[1]), (*end, *header(roles[2]))
    return Template(name, (*first, *user), assistant, tuple(end), strip, before_next=(*end, *user))


_CHATML = ("system", "user", "assistant")
_START, _END = Special("<|im_start|>"), Special("<|im_end|>")

TEMPLATES = {
    template.name: template
    for template in (
        _turns("chatml-plain", _CHATML, (_END,), starts=(_START,)),
        _turns("chatml", _CHATML, (_END, "\n"), starts=(_START,)),
        _turns("Hermes-2", _CHATML, (_END,), starts=(_START,), system=_INTERNVL),
        _turns("internlm2-chat", _CHATML, (_END,), starts=(_START,), system=_INTERNVL, strip=True),
        _turns("internvl2_5", _CHATML, (_END, "\n"), starts=(_START,), system=_INTERNVL_2_5),
        _turns("phi3-chat", ("<|system|>", "<|user|>", "<|assistant|>"), (Special("<|end|>"),), system=_INTERNVL),
        # The roles of this one are plain text, which a message can spell; no tokenisation can tell them apart.
        Template("internvl_zh", (" <human>: ",), (" <bot>: ",), (Special("</s>"),)),
    )
}


def find_template(path: Path) -> Template:
    """The chat format of a checkpoint folder.

    `config.json` names it under `template`. A checkpoint of the transformers-native layout has a `chat_template`
    instead (in `chat_template.jinja`, `chat_template.json`, `processor_config.json` or `tokenizer_config.json`): it is
    rendered in Jinja's sandbox, in a process of its own with little time and memory, and the format that spells the
    same conversations, of one turn and of two, is taken. Raises ValueError listing the known formats where none fits or
    rendering fails.
    """
    file = path / "config.json"
    config = read_object(file)
    name = config.get("template")
    if isinstance(name, str) and name in TEMPLATES:
        return TEMPLATES[name]
    if name is not None or "text_config" not in config:
        raise ValueError(f"{file}: template {name!r} is not known; known: {', '.join(TEMPLATES)}")
    source, text = _chat_template(path)
    try:
        rendered, twice = (_render(text, turns) for turns in (1, 2))
    except ValueError as error:
        raise ValueError(f"{source}: the chat template cannot be rendered ({error}): {_NAME_ONE}") from error
    asked, later = ("", "\n" + _PROMPT), (_PROMPT,)
    for template in TEMPLATES.values():
        if spell(template.pieces(asked, (1,), _RESPONSE)) != rendered:
            continue
        if (
            template.before_next is None
            or spell(template.pieces(later, (1,), _RESPONSE, [(asked, _RESPONSE)])) == twice
        ):
            return template
        rendered = twice  # what differs
    raise ValueError(f"{source}: the chat template makes {rendered[:500]!r}, which is no known format: {_NAME_ONE}")


_PROMPT, _RESPONSE = "the prompt", "the response"
_SECONDS, _BYTES = 2, 2**29
_NAME_ONE = f'name one of {", ".join(TEMPLATES)} in config.json as "template"'


def _chat_template(path: Path) -> tuple[Path, str]:
    """(file, Jinja source) of a folder's chat template, in the order of precedence that transformers has."""
    jinja = path / "chat_template.jinja"
    if jinja.exists():
        try:
            return jinja, jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{jinja} cannot be read: {why(error)}") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        text = read_optional(path / name).get("chat_template")
        if isinstance(text, str):
            return path / name, text
    raise ValueError(f"{path} has no chat template: {_NAME_ONE}")


def _render(text: str, turns: int) -> str:
    """A user turn with an image and an assistant turn, and more of them without, in one spelling of the image.

    Raises ValueError where the template fails, or takes more than `_SECONDS` of CPU time or `_BYTES` of memory.
    """
    user = [{"type": "image"}, {"type": "text", "text": _PROMPT}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": _RESPONSE}]}
    messages = [{"role": "user", "content": user}, answer]
    messages += [{"role": "user", "content": user[1:]}, answer] * (turns - 1)
    variables = {"messages": messages, "add_generation_prompt": False, "bos_token": ""}
    task = {"template": text, "variables": variables, "seconds": _SECONDS, "bytes": _BYTES}
    command = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(task).encode(), capture_output=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise ValueError("it takes more than a minute") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()[:500]
        raise ValueError(reason or f"it takes more than {_SECONDS} s or {_BYTES // 2**20} MiB")
    rendered = json.loads(done.stdout)
    expanded = IMAGE_START + IMAGE_CONTEXT + IMAGE_END
    # Early conversions spell the image as their processor's placeholder.
    rendered = rendered.replace(expanded, IMAGE_CONTEXT).replace(IMAGE_PLACEHOLDER, IMAGE_CONTEXT)
    return rendered.replace(IMAGE_CONTEXT, expanded)
