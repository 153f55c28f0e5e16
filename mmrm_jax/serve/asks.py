"""Requests of every shape as the one that is scored: an image list, a prompt, responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mmrm_jax.data.templates import IMAGE_PLACEHOLDER, IMAGE_START, Template, spell
from mmrm_jax.serve.pictures import from_data_url
from mmrm_jax.serve.schemas import ClassifyRequest, Content, Message, OpenRlhfRequest, Part, RerankRequest, ScoreRequest


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt with its images, as encoded bytes, the responses to it, and the turns before it.

    `shown` are the images by what the request calls them, `name` is what it calls the ask where it may have several.
    """

    shown: Mapping[str, bytes]
    prompt: str
    responses: tuple[str, ...]
    history: tuple[str, ...] = ()
    name: str = ""

    @property
    def images(self) -> tuple[bytes, ...]:
        """The images in their order."""
        return tuple(self.shown.values())


def of_score(request: ScoreRequest) -> Ask:
    """Of this server's own shape. Raises ImageError for what is no data URL."""
    shown = _decoded({f"images[{i}]": url for i, url in enumerate(request.images)})
    return Ask(shown, request.prompt, tuple(request.responses), tuple(request.history))


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
        given = request.images[i] if request.images is not None else None
        urls = {f"images[{i}][{k}]": url for k, url in enumerate(given)} if isinstance(given, list) else {}
        shown = _decoded({f"images[{i}]": given} if isinstance(given, str) else urls)
        asks.append(_of_query(shown, query, request.prompts[i] if request.prompts else None, template, i))
    return asks


def _decoded(urls: Mapping[str, str]) -> dict[str, bytes]:
    return {name: from_data_url(url, name) for name, url in urls.items()}


def _of_query(shown: Mapping[str, bytes], query: str, prompt: str | None, template: Template, i: int) -> Ask:
    name = f"query[{i}]"
    if (found := rendered(query, template)) is not None:
        *history, asked, response = found
        return Ask(shown, asked, (response,), tuple(history), name)
    query = _ended(query, spell(template.after_response))
    spelt = next((token for token in template.special_tokens if token in query), None)
    if spelt is not None:
        raise ValueError(
            f"{name} spells {spelt}, but not as the model's chat template {template.name} does: render it with the "
            "tokenizer of the model's folder"
        )
    if prompt is not None and query.startswith(prompt):
        return Ask(shown, prompt, (query[len(prompt) :],), name=name)
    raise ValueError(
        f"{name} is neither a conversation as the model's chat template renders it nor prompts[{i}] with a "
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
        asks.append(Ask({}, prompt, (response,), tuple(history), f"input[{i}]"))
    return asks


def of_messages(messages: Sequence[Message]) -> Ask:
    """Of messages of the user and the assistant in turn, the last of which is scored; a system message is refused.

    Raises ValueError where they are not these, or the assistant shows an image.
    """
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        told = roles if len(roles) <= 8 else [*roles[:8], "..."]
        raise ValueError(
            f"messages are of {', '.join(told) or 'none'}; they must be the user's and the assistant's in turn, and "
            "end with the answer that is scored"
        )
    images: dict[str, bytes] = {}
    texts: list[str] = []
    for i, message in enumerate(messages):
        shown, text = of_parts(message.content, f"messages[{i}]")
        if shown and message.role == "assistant":
            raise ValueError(f"messages[{i}] has an image; only the user's may have one")
        images |= shown
        texts.append(text)
    *history, prompt, response = texts
    return Ask(images, prompt, (response,), tuple(history))


def of_parts(content: str | Sequence[Part], name: str) -> tuple[dict[str, bytes], str]:
    """(images by name, text with <image> at their places) of a message's content.

    The places are those of the image parts, or, where the text says as many of its own, these, as in vLLM. Raises
    ValueError where it says another number.
    """
    if isinstance(content, str):
        return {}, content
    urls: dict[str, str] = {}
    own = sum((part.text or "").count(IMAGE_PLACEHOLDER) for part in content)
    if own not in (0, shown := sum(part.type == "image_url" for part in content)) and shown:
        raise ValueError(
            f"{name} has {shown} image(s), and {own} {IMAGE_PLACEHOLDER} in its text; say as many, or none"
        )
    text: list[str] = []
    for i, part in enumerate(content):
        if part.type == "image_url":
            if part.image_url is None:
                raise ValueError(f"{name}.content[{i}] has no image_url")
            urls[f"{name}.content[{i}].image_url.url"] = part.image_url.url
            text += [IMAGE_PLACEHOLDER] * (not own)
        elif part.text is None:
            raise ValueError(f"{name}.content[{i}] has no text")
        else:
            text.append(part.text)
    return _decoded(urls), "\n".join(text)


def of_rerank(request: RerankRequest) -> Ask:
    """The query as prompt, the documents as responses."""
    content = request.query.content if isinstance(request.query, Content) else request.query
    images, prompt = of_parts(content, "query")
    return Ask(images, prompt, tuple(request.documents))
