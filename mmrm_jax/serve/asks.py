"""Requests of every shape as the one that is scored: an image list, a prompt, responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mmrm_jax.data.templates import IMAGE_PLACEHOLDER, IMAGE_START, Template, spell
from mmrm_jax.serve.pictures import from_data_url
from mmrm_jax.serve.schemas import ClassifyRequest, Content, Message, OpenRlhfRequest, Part, RerankRequest, ScoreRequest


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt with its images, as encoded bytes, the responses to it, and the turns before it."""

    images: tuple[bytes, ...]
    prompt: str
    responses: tuple[str, ...]
    history: tuple[str, ...] = ()


def of_score(request: ScoreRequest) -> Ask:
    """Of this server's own shape. Raises ImageError for what is no data URL."""
    images = tuple(from_data_url(url, f"images[{i}]") for i, url in enumerate(request.images))
    return Ask(images, request.prompt, tuple(request.responses), tuple(request.history))


def of_open_rlhf(request: OpenRlhfRequest, template: Template) -> list[Ask]:
    """Of each query: what the chat template made of a prompt and a response, or a text that begins with its prompt.

    Raises ValueError naming the query that is neither, and where `prompts` or `images` are not as many.
    """
    for name in ("prompts", "images"):
        given = getattr(request, name)
        if given is not None and len(given) != len(request.query):
            raise ValueError(f"{name} has {len(given)} entries for {len(request.query)} queries")
    asks = []
    for i, query in enumerate(request.query):
        shown = request.images[i] if request.images is not None else None
        urls = [] if shown is None else [shown] if isinstance(shown, str) else shown
        images = tuple(from_data_url(url, f"images[{i}]") for url in urls)
        asks.append(_of_query(images, query, request.prompts[i] if request.prompts else None, template, i))
    return asks


def _of_query(images: tuple[bytes, ...], query: str, prompt: str | None, template: Template, i: int) -> Ask:
    if (found := rendered(query, template)) is not None:
        *history, asked, response = found
        return Ask(images, asked, (response,), tuple(history))
    query = _ended(query, spell(template.after_response))
    spelt = next((token for token in template.special_tokens if token in query), None)
    if spelt is not None:
        raise ValueError(
            f"query[{i}] spells {spelt}, but not as the model's chat template {template.name} does: render it with the "
            "tokenizer of the model's folder"
        )
    if prompt is not None and query.startswith(prompt):
        return Ask(images, prompt, (query[len(prompt) :],))
    raise ValueError(
        f"query[{i}] is neither a conversation as the model's chat template renders it nor prompts[{i}] with a "
        "response behind it"
    )


def rendered(text: str, template: Template) -> list[str] | None:
    """The turns of a conversation that `template` spells like this, without images: the last two are the prompt and the
    response. None of another text."""
    before, between, after = (
        spell(pieces) for pieces in (template.before_prompt, template.before_response, template.after_response)
    )
    if not text.startswith(before) or IMAGE_START in text:
        return None
    head, found, response = text[len(before) :].rpartition(between)
    if not found:
        return None
    turns: list[str] = []
    if template.before_next is not None:
        *earlier, head = head.split(spell(template.before_next))
        for turn in earlier:
            asked, found, answer = turn.partition(between)
            if not found:
                return None
            turns += [asked, answer]
    turns += [head, _ended(response, after)]
    # What is left of the format in a turn is of another one, or of another speaker.
    return None if any(token in turn for token in template.special_tokens for turn in turns) else turns


def _ended(response: str, after: str) -> str:
    """A response without the end of its turn, of which generation leaves a last line break out."""
    ends = [end for end in (after, after.rstrip("\n")) if end]
    return next((response.removesuffix(end) for end in ends if response.endswith(end)), response)


def of_classify(request: ClassifyRequest, template: Template) -> list[Ask]:
    """Of messages, or of each text of `input`. Raises ValueError for neither, both, or what is no conversation."""
    if (request.messages is None) == (request.input is None):
        raise ValueError("give either messages or input")
    if request.messages is not None:
        return [of_messages(request.messages)]
    assert request.input is not None
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not texts:
        raise ValueError("input is an empty list")
    asks = []
    for i, text in enumerate(texts):
        if (found := rendered(text, template)) is None:
            raise ValueError(
                f"input[{i}] is no conversation as the model's chat template renders it; send messages instead"
            )
        *history, prompt, response = found
        asks.append(Ask((), prompt, (response,), tuple(history)))
    return asks


def of_messages(messages: Sequence[Message]) -> Ask:
    """Of messages of the user and the assistant in turn, the last of which is scored; a system message is refused.

    Raises ValueError where they are not these, or the assistant shows an image.
    """
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            f"messages are of {', '.join(roles) or 'none'}; they must be the user's and the assistant's in turn, and "
            "end with the answer that is scored"
        )
    images: tuple[bytes, ...] = ()
    texts: list[str] = []
    for i, message in enumerate(messages):
        shown, text = of_parts(message.content, f"messages[{i}]")
        if shown and message.role == "assistant":
            raise ValueError(f"messages[{i}] has an image; only the user's may have one")
        images += shown
        texts.append(text)
    *history, prompt, response = texts
    return Ask(images, prompt, (response,), tuple(history))


def of_parts(content: str | Sequence[Part], name: str) -> tuple[tuple[bytes, ...], str]:
    """(images, text with <image> at their places) of a message's content."""
    if isinstance(content, str):
        return (), content
    images: list[bytes] = []
    text: list[str] = []
    for i, part in enumerate(content):
        if part.type == "image_url":
            if part.image_url is None:
                raise ValueError(f"{name}.content[{i}] has no image_url")
            images.append(from_data_url(part.image_url.url, f"{name}.content[{i}].image_url.url"))
            text.append(IMAGE_PLACEHOLDER)
        elif part.text is None:
            raise ValueError(f"{name}.content[{i}] has no text")
        else:
            text.append(part.text)
    return tuple(images), "\n".join(text)


def of_rerank(request: RerankRequest) -> Ask:
    """The query as prompt, the documents as responses."""
    content = request.query.content if isinstance(request.query, Content) else request.query
    images, prompt = of_parts(content, "query")
    return Ask(images, prompt, tuple(request.documents))
