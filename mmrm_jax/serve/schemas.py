"""Requests and answers of every endpoint, as pydantic checks and OpenAPI shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmrm_jax.serve.settings import LONGEST

T = TypeVar("T")

# Of what a client sends: not longer, and the first entry that is wrong is the only one that is told.
Items = Annotated[list[T], Field(max_length=LONGEST, fail_fast=True)]
DataUrl = Annotated[str, Field(description="data:image/png;base64,... (or jpeg, webp, gif, bmp, tiff)")]


class Strict(BaseModel):
    """A body whose fields are the named ones."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few(cls, body: Any) -> Any:
        """Raises ValueError for many unknown fields at once, which would be an error each."""
        if isinstance(body, dict) and len(body) > 2 * len(cls.model_fields):
            raise ValueError(f"{len(body)} fields; there are only {', '.join(cls.model_fields)}")
        return body


class Open(BaseModel):
    """A body that other clients send, with fields that are not read."""

    model_config = ConfigDict(extra="ignore")


class ScoreRequest(Strict):
    """One prompt, its images, and the responses to score."""

    prompt: Annotated[str, Field(description='images stand at "<image>", or before the text')]
    responses: Annotated[Items[str], Field(min_length=1)]
    history: Annotated[
        Items[str], Field(description="turns before the prompt, of the user and the assistant in turn")
    ] = []
    images: Items[DataUrl] = []
    proxy: Annotated[bool, Field(description="also what text alone would give")] = False


class ScoreAnswer(BaseModel):
    """One reward a response, in their order."""

    model: str
    rewards: list[float]
    proxy: list[float] | None = None


class OpenRlhfRequest(Open):
    """What OpenRLHF's remote reward model gets; `images` is this server's addition: null, one, or several a query."""

    query: Annotated[Items[str], Field(min_length=1)]
    prompts: Items[str] | None = None
    labels: Items[Any] | None = None
    images: Items[DataUrl | Items[DataUrl] | None] | None = None


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
    content: str | Items[Part]


class ClassifyRequest(Open):
    """What vLLM's /classify and /pooling get: messages that end with the assistant's, or texts as the chat template
    renders them."""

    model: str | None = None
    input: str | Items[str] | None = None
    messages: Items[Message] | None = None
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

    content: Items[Part]


class RerankRequest(Open):
    """A prompt, perhaps with images, and the responses to rank."""

    query: str | Content
    documents: Annotated[Items[str], Field(min_length=1)]
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
