"""The application: every endpoint a few lines, one engine behind all of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from scipy.special import expit
from starlette.exceptions import HTTPException

from mmrm_jax import __version__
from mmrm_jax.data.templates import Template
from mmrm_jax.data.text import TextError
from mmrm_jax.eval.scorer import Scorer
from mmrm_jax.serve import asks, schemas
from mmrm_jax.serve.asks import Ask
from mmrm_jax.serve.batcher import QueueFullError
from mmrm_jax.serve.engine import Engine, Found
from mmrm_jax.serve.guard import Guard
from mmrm_jax.serve.metrics import Metrics
from mmrm_jax.serve.prefixes import Asked
from mmrm_jax.serve.settings import Limits

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "description": text}
    for status, text in (
        (400, "No JSON, or headers that cannot be."),
        (401, "No token, or a wrong one."),
        (408, "The body took too long."),
        (413, "A body that is too large."),
        (422, "What cannot be scored, and why."),
        (429, "Too much is waiting or arriving: try again after Retry-After seconds."),
        (503, "Not ready, or not in time: try again after Retry-After seconds."),
    )
}

FEW, SHOWN = 5, 200  # what is told of errors in a body: how many, and how many characters of each

# Of the page: nothing from elsewhere.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
)


class Score(Protocol):
    """Asks to rewards, with what goes wrong as a status; the asks are made inside, so that this holds for them too."""

    def __call__(self, asked: Callable[[], Sequence[Ask]], *, proxy: bool = False) -> Awaitable[list[Found]]: ...


class Json(JSONResponse):
    """JSON in ASCII, so that any text can be told again, and without NaN."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return json.dumps(content, allow_nan=False).encode("ascii")


def make_app(
    scorer: Scorer,
    name: str,
    limits: Limits,
    *,
    token: str | None = None,
    prefix_cache: int = 2**30,
    empty_reward: float | None = None,
    warm: bool = True,
    on_ready: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The server of one model, called `name`; with `warm` it is ready once its common shapes are compiled, and then
    calls `on_ready`.

    `prefix_cache` is how many bytes of what image and prompt became are kept for the next responses to them,
    `empty_reward` the reward of an empty response; without, a request that has one is refused.
    """
    metrics = Metrics()
    engine = Engine(scorer, limits, metrics, prefix_cache=prefix_cache, empty_reward=empty_reward)
    template = scorer.checkpoint.processor.chat.template
    ready, stopping = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = threading.Thread(target=_warm, args=(engine, ready, stopping, warm, on_ready))
        warming.start()
        yield
        stopping.set()
        warming.join()  # a process must not end while XLA compiles
        ready.clear()
        metrics.ready.set(0)
        engine.close()

    app = FastAPI(
        title="mmrm_jax",
        version=__version__,
        description="Rewards of responses to an image and a prompt. Images travel as data URLs or uploads; nothing is "
        "fetched, and no file of the server is read.",
        lifespan=lifespan,
        responses=PROBLEMS,
        default_response_class=Json,
    )

    async def score(asked: Callable[[], Sequence[Ask]], *, proxy: bool = False) -> list[Found]:
        if not ready.is_set():
            raise HTTPException(503, "the model is being compiled: not ready yet", {"Retry-After": "5"})
        try:
            return await engine.score(asked(), proxy=proxy)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        except TimeoutError as error:
            raise HTTPException(503, f"not scored within {limits.seconds:g} s", {"Retry-After": "5"}) from error

    _add_scoring(app, score, name, template)
    _add_probes(app, engine, ready, metrics)
    _add_problems(app)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model there is, as OpenAI lists models."""
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "mmrm_jax"}]}

    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(Guard, limits=limits, token=token, metrics=metrics, paths=paths)  # type: ignore[arg-type]
    return app


def _add_scoring(app: FastAPI, score: Score, name: str, template: Template) -> None:
    """What gives rewards, in every client's shape."""

    @app.post("/v1/score")
    async def v1_score(request: schemas.ScoreRequest) -> schemas.ScoreAnswer:
        """Rewards of responses to one prompt and its images."""
        (found,) = await score(lambda: [asks.of_score(request)], proxy=request.proxy)
        return schemas.ScoreAnswer(model=name, rewards=found.rewards, proxy=found.proxy)

    @app.post("/v1/score/upload")
    async def v1_score_upload(
        prompt: Annotated[str, Form()],
        responses: Annotated[list[str], Form()],
        history: Annotated[list[str] | None, Form()] = None,
        images: Annotated[list[UploadFile] | None, File()] = None,
        proxy: Annotated[bool, Form()] = False,
    ) -> schemas.ScoreAnswer:
        """The same with images as uploaded files."""
        shown = {f"images[{i}]": await image.read() for i, image in enumerate(images or [])}
        asked = [Ask(shown, prompt, tuple(responses), tuple(history or ()))]
        (found,) = await score(lambda: asked, proxy=proxy)
        return schemas.ScoreAnswer(model=name, rewards=found.rewards, proxy=found.proxy)

    @app.post("/get_reward")
    async def get_reward(request: schemas.OpenRlhfRequest) -> schemas.OpenRlhfAnswer:
        """OpenRLHF's remote reward model."""
        found = await score(lambda: asks.of_open_rlhf(request, template))
        rewards = [reward for each in found for reward in each.rewards]
        return schemas.OpenRlhfAnswer(rewards=rewards, scores=rewards)

    @app.post("/classify")
    async def classify(request: schemas.ClassifyRequest) -> schemas.ClassifyAnswer:
        """As vLLM's /classify of a reward model: one class, of the reward's sigmoid or the reward itself."""
        found = await score(lambda: asks.of_classify(request, template))
        plain = request.activation is False or request.use_activation is False
        rewards = [each.rewards[0] if plain else float(expit(each.rewards[0])) for each in found]
        data = [schemas.Classified(index=i, probs=[reward]) for i, reward in enumerate(rewards)]
        return schemas.ClassifyAnswer(id=_id("classify"), model=name, data=data, usage=_usage(found))

    @app.post("/pooling")
    async def pooling(request: schemas.ClassifyRequest) -> schemas.PoolingAnswer:
        """As vLLM's /pooling of a reward model: the reward."""
        found = await score(lambda: asks.of_classify(request, template))
        data = [schemas.Pooled(index=i, data=each.rewards) for i, each in enumerate(found)]
        return schemas.PoolingAnswer(id=_id("pool"), model=name, data=data, usage=_usage(found))

    @app.post("/v1/rerank")
    async def rerank(request: schemas.RerankRequest) -> schemas.RerankAnswer:
        """As vLLM's /v1/rerank: documents are responses, the best first."""
        found = await score(lambda: [asks.of_rerank(request)])
        order = np.argsort(-np.asarray(found[0].rewards), kind="stable")[: request.top_n or None].tolist()
        results = [
            schemas.Ranked(
                index=i, document=schemas.Document(text=request.documents[i]), relevance_score=found[0].rewards[i]
            )
            for i in order
        ]
        return schemas.RerankAnswer(id=_id("rerank"), model=name, usage=_usage(found), results=results)


def _add_probes(app: FastAPI, engine: Engine, ready: threading.Event, metrics: Metrics) -> None:
    """What says how the server is, and the page."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def readiness() -> dict[str, str]:
        """The model is warm, and the server is not stopping; 503 else."""
        if not ready.is_set():
            raise HTTPException(503, "the model is being compiled, or the server is stopping", {"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics_text() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        """Drop an image, type a prompt and responses, see them ranked."""
        text = (files("mmrm_jax.serve") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(
            text.replace("{{proxy}}", "true" if engine.has_proxy else "false"),
            headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"},
        )


def _add_problems(app: FastAPI) -> None:
    """Every refusal as one sentence."""

    @app.exception_handler(RequestValidationError)
    async def not_as_asked(_: Request, error: RequestValidationError) -> Response:
        """What a body lacks or has too much of, without telling it again: the first few of it."""
        errors = error.errors()
        found = [f"{'.'.join(map(str, e['loc']))[:SHOWN]}: {e['msg'][:SHOWN]}" for e in errors[:FEW]]
        more = [f"{len(errors) - FEW} more"] if len(errors) > FEW else []
        return Json({"detail": "; ".join(found + more)}, 422)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        """A status and its reason."""
        return Json({"detail": error.detail}, error.status_code, headers=error.headers)


def _warm(
    engine: Engine, ready: threading.Event, stopping: threading.Event, warm: bool, on_ready: Callable[[], None]
) -> None:
    """Compile what common requests run through: without an image, with a small one and with a photo, of one, two and
    four responses. Ends between two compilations when the server stops."""
    scorer, prefixes = engine.scorer, engine.prefixes
    side = scorer.checkpoint.processor.preprocessing.image_size
    sizes = ((), (side, side), (4 * side, 3 * side)) if warm else ()
    for size, responses, branch in itertools.product(sizes, (1, 2, 4), scorer.views):
        if stopping.is_set():
            return
        shown = [scorer.features(scorer.tiles(Image.new("RGB", size)))] if size else []  # type: ignore[arg-type]
        answers, proxy = ["An answer."] * responses, branch == "proxy"
        try:
            group = scorer.encode(shown, "What is this?", answers, proxy=proxy, alone=prefixes.on)[0]
        except TextError:  # a photo has more tokens than the model may see
            continue
        prefixes.rewards([Asked(group, repr(size).encode())], branch)  # type: ignore[arg-type]
    ready.set()
    engine.metrics.ready.set(1)
    on_ready()


def _usage(found: Sequence[Found]) -> schemas.Usage:
    return schemas.Usage(prompt_tokens=sum(f.prompt_tokens for f in found), total_tokens=sum(f.tokens for f in found))


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
