"""Requests and answers of every endpoint, as pydantic checks and OpenAPI shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DataUrl = Annotated[str, Field(description="data:image/png;base64,... (or jpeg, webp, gif, bmp, tiff)")]


class Strict(BaseModel):
    """A body whose fields are the named ones."""

    model_config = ConfigDict(extra="forbid")


class Open(BaseModel):
    """A body that other clients send, with fields that are not read."""

    model_config = ConfigDict(extra="ignore")


class ScoreRequest(Strict):
    """One prompt, its images, and the responses to score."""

    prompt: Annotated[str, Field(description='images stand at "<image>", or before the text')]
    responses: Annotated[list[str], Field(min_length=1)]
    history: Annotated[
        list[str], Field(description="turns before the prompt, of the user and the assistant in turn")
    ] = []
    images: list[DataUrl] = []
    proxy: Annotated[bool, Field(description="also what text alone would give")] = False


class ScoreAnswer(BaseModel):
    """One reward a response, in their order."""

    model: str
    rewards: list[float]
    proxy: list[float] | None = None


class OpenRlhfRequest(Open):
    """What OpenRLHF's remote reward model gets; `images` is this server's addition: null, one, or several a query."""

    query: Annotated[list[str], Field(min_length=1)]
    prompts: list[str] | None = None
    labels: list[Any] | None = None
    images: list[DataUrl | list[DataUrl] | None] | None = None


class OpenRlhfAnswer(BaseModel):
    """Rewards in the order of the queries; `scores` are the same."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, Any] = {}


class ImageUrl(Open):
    """Where an image is: in the URL itself."""

    url: DataUrl


class Part(Open):
    """A part of an OpenAI message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(Open):
    """An OpenAI message."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class ClassifyRequest(Open):
    """What vLLM's /classify and /pooling get: messages that end with the assistant's, or texts as the chat template
    renders them."""

    model: str | None = None
    input: str | list[str] | None = None
    messages: list[Message] | None = None
    activation: Annotated[bool | None, Field(description="false: rewards as they are; else their sigmoid")] = None
    use_activation: bool | None = None


class Classified(BaseModel):
    """One conversation."""

    index: int
    label: str = "reward"
    probs: list[float]
    num_classes: int = 1


class Usage(BaseModel):
    """Tokens that were scored, those of images included."""

    prompt_tokens: int
    total_tokens: int


class ClassifyAnswer(BaseModel):
    """As vLLM answers /classify."""

    id: str
    object: str = "list"
    model: str
    data: list[Classified]
    usage: Usage


class Pooled(BaseModel):
    """One conversation."""

    index: int
    object: str = "pooling"
    data: list[float]


class PoolingAnswer(BaseModel):
    """As vLLM answers /pooling."""

    id: str
    object: str = "list"
    model: str
    data: list[Pooled]
    usage: Usage


class Content(Open):
    """A query or document of parts."""

    content: list[Part]


class RerankRequest(Open):
    """A prompt, perhaps with images, and the responses to rank."""

    query: str | Content
    documents: Annotated[list[str], Field(min_length=1)]
    top_n: Annotated[int | None, Field(ge=0, description="most results; all without it, or at 0")] = None
    model: str | None = None


class Document(BaseModel):
    """A response."""

    text: str


class Ranked(BaseModel):
    """A response, its place in the request, and its reward."""

    index: int
    document: Document
    relevance_score: float


class RerankAnswer(BaseModel):
    """As vLLM answers /v1/rerank: the best first."""

    id: str
    model: str
    usage: Usage
    results: list[Ranked]


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str
