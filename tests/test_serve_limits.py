"""What `mmrm serve` bounds: small bodies that would cost much, what waits, what arrives, and how errors name it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from pictures import data_url, png

import mmrm_jax
from mmrm_jax.data.text import TextError
from mmrm_jax.eval.scorer import Scorer
from mmrm_jax.serve.app import make_app
from mmrm_jax.serve.asks import Ask
from mmrm_jax.serve.batcher import QueueFullError
from mmrm_jax.serve.engine import Engine
from mmrm_jax.serve.guard import Guard
from mmrm_jax.serve.metrics import Metrics
from mmrm_jax.serve.settings import LONGEST, Limits
from mmrm_jax.tiny import MODEL_DIR

pytestmark = pytest.mark.usefixtures("one_device")

JSON = {"Content-Type": "application/json"}
QUERY = "<|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>"


@pytest.fixture(scope="module")
def rm(one_device) -> Scorer:
    """A model that is its own proxy."""
    rm = mmrm_jax.load(MODEL_DIR, draw_score=3, batch_size=8)
    params = rm.params | {"proxy": rm.params["primary"]}
    views = rm.views | {"proxy": "absent"}
    return Scorer(rm.checkpoint, params, rm.mesh, views=views, dtype="float32", batch_size=8)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client(rm: Scorer) -> Iterator[TestClient]:
    with TestClient(make_app(rm, "tiny", Limits(), warm=False)) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        yield client


def post(client: TestClient, path: str, body: dict[str, Any]) -> httpx.Response:
    return client.post(path, content=json.dumps(body), headers=JSON)  # type: ignore[return-value]


# --- bodies ---------------------------------------------------------------------------------------------------------

MANY = 300_000
WRONG = {
    "responses": ("/v1/score", {"prompt": "p", "responses": [1] * MANY}, "responses.0: Input should be a valid string"),
    "long": ("/v1/score", {"prompt": "p", "responses": ["a"] * MANY}, f"at most {LONGEST} items"),
    "history": ("/v1/score", {"prompt": "p", "responses": ["a"], "history": [None] * MANY}, "history.0"),
    "images": ("/v1/score", {"prompt": "p", "responses": ["a"], "images": [1] * MANY}, "images.0"),
    "fields": ("/v1/score", {f"{i}": 1 for i in range(MANY)}, f"{MANY} fields; there are only prompt, responses"),
    "a field": ("/v1/score", {"prompt": "p", "responses": ["a"], "x" * MANY: 1}, "Extra inputs are not permitted"),
    "query": ("/get_reward", {"query": [1] * MANY, "prompts": [1] * MANY}, "query.0"),
    "labels": ("/get_reward", {"query": ["p"], "labels": [[]] * MANY}, f"at most {LONGEST} items"),
    "images of a query": ("/get_reward", {"query": ["p"], "images": [[1] * MANY] * 2}, "images.0"),
    "input": ("/classify", {"input": [1] * MANY}, "input"),
    "messages": ("/classify", {"messages": [{}] * MANY}, "messages.0.role"),
    "roles": ("/classify", {"messages": [{"role": "user", "content": "a"}] * 9999}, "user, ...; they must be"),
    "parts": ("/pooling", {"messages": [{"role": "user", "content": [1] * MANY}]}, "messages.0.content"),
    "documents": ("/v1/rerank", {"query": {"content": [1] * MANY}, "documents": [1] * MANY}, "documents.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_of_many_wrong_entries_little_is_told(client: TestClient, case: str) -> None:
    path, body, reason = WRONG[case]
    answer = post(client, path, body)
    assert answer.status_code == 422 and reason in answer.json()["detail"], answer.text[:1000]
    assert len(answer.content) < 1000 and not answer.json()["detail"].endswith("more")


def test_only_the_first_few_errors_are_told(client: TestClient) -> None:
    files = [("responses", (f"{i}.txt", b"a", "text/plain")) for i in range(100)]
    answer = client.post("/v1/score/upload", files=files)
    told = answer.json()["detail"]
    assert answer.status_code == 422 and told.endswith("; 96 more") and told.count(";") == 5


def test_json_of_more_values_than_can_be_scored_is_not_read(client: TestClient) -> None:
    nested = b"[" * 400 + b"]" * 400
    for labels in (b"[]," * 2**21 + b"[]", b",".join([nested] * 5000)):
        body = b'{"query": ["p"], "labels": [' + labels + b"]}"
        answer = client.post("/get_reward", content=body, headers=JSON)
        assert answer.status_code == 413 and "commas and brackets" in answer.json()["detail"]
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/score/upload", content=b"&" * 2**22, headers=form).status_code == 413
    picture = {"images": ("a.png", b"," * 2**21, "image/png")}
    answer = client.post("/v1/score/upload", data={"prompt": "p", "responses": ["a"]}, files=picture)
    assert answer.status_code == 422 and "images[0]: image of 2097152 bytes" in answer.json()["detail"]


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=f"limits.responses is 70000; it must be at most {LONGEST}"):
        Limits(responses=70_000)
    with pytest.raises(ValueError, match=r"limits.bodies_mib is 256; it must be at least limits.body_mib, 300"):
        Limits(body_mib=300)


class Served:
    """A guard before an application that answers once `go` is set, and what it was asked and answered."""

    def __init__(self, **limits: float):
        self.go, self.seen, self.sent = asyncio.Event(), [], []
        paths = frozenset(("/", "/health", "/ready", "/v1/score"))
        self.guard = Guard(self.app, limits=Limits(**limits), token="t", metrics=Metrics(), paths=paths)  # type: ignore[arg-type]

    async def app(self, _scope, receive, send) -> None:
        self.seen.append((await receive())["body"])
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(self, path: str, parts: list[bytes], token: bytes = b"Bearer t") -> tuple[int, dict[bytes, bytes]]:
        """Status and headers of the answer to a body of these parts; one without an empty last part never ends."""
        left, sent = list(parts), []

        async def receive() -> dict[str, Any]:
            if not left:
                await asyncio.sleep(60)
            part = left.pop(0)
            return {"type": "http.request", "body": part, "more_body": part != b""}

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "method": "POST", "headers": [(b"authorization", token)]}
        await self.guard(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"])


def test_no_body_is_read_that_nobody_asks_for() -> None:
    async def check() -> None:
        served = Served(body_mib=1)
        served.go.set()
        for path in ("/", "/health", "/ready"):
            assert (await served.ask(path, [], token=b""))[0] == 200
        assert (await served.ask("/nowhere", []))[0] == 200
        assert served.seen == [b""] * 4
        assert (await served.ask("/v1/score", [], token=b"Bearer x"))[0] == 401
        assert len(served.seen) == 4

    asyncio.run(asyncio.wait_for(check(), 30))


def test_bodies_are_bounded_together() -> None:
    async def check() -> None:
        served = Served(body_mib=1, bodies_mib=2, seconds=1)
        part = bytes(2**19)
        first = asyncio.create_task(served.ask("/v1/score", [part, part, b""]))
        second = asyncio.create_task(served.ask("/v1/score", [part, b""]))
        while len(served.seen) < 2:
            await asyncio.sleep(0.001)
        status, headers = await served.ask("/v1/score", [part, part, b""])
        assert status == 429 and headers[b"retry-after"] == b"1" and headers[b"connection"] == b"close"
        assert served.guard.held == 3 * 2**19
        assert (await served.ask("/v1/score", [part]))[0] == 408  # the rest does not come
        assert served.guard.held == 3 * 2**19
        served.go.set()
        assert [(await first)[0], (await second)[0]] == [200, 200] and served.guard.held == 0
        assert (await served.ask("/v1/score", [part, part, part]))[0] == 413 and served.guard.held == 0
        assert (await served.ask("/v1/score", [part, part, b""]))[0] == 200

    asyncio.run(asyncio.wait_for(check(), 30))


# --- turns and tokens -----------------------------------------------------------------------------------------------


def test_turns_are_bounded(client: TestClient) -> None:
    body = {"prompt": "p", "responses": ["a"], "images": [data_url(png())]}
    assert post(client, "/v1/score", body | {"history": ["", ""] * 128}).status_code == 200
    answer = post(client, "/v1/score", body | {"history": ["", ""] * 129})
    assert answer.status_code == 422 and "the request has 258 turns" in answer.json()["detail"]
    turns = QUERY.removesuffix("A<|im_end|>") + "A<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n" * 129
    answer = post(client, "/get_reward", {"query": [QUERY, turns + "A"]})
    assert answer.status_code == 422 and "query[1] has 258 turns" in answer.json()["detail"]


def test_of_conversations_that_are_too_long_one_is_tokenised(rm: Scorer, monkeypatch) -> None:
    chat, made = rm.checkpoint.processor.chat, []
    encode = chat.encode
    monkeypatch.setattr(chat, "encode", lambda *given: made.append(given) or encode(*given))
    with pytest.raises(TextError, match="over the budget"):
        rm.encode([], "p " * 9000, [f"{i}" for i in range(200)])
    assert len(made) == 1
    with pytest.raises(TextError, match="over the budget"):
        rm.encode([], "p", ["a", "b", "c " * 9000, *"de"])
    assert len(made) == 1 + 3


# --- the queue and the time -----------------------------------------------------------------------------------------


class Held:
    """A model's `encode` that waits until `go` is set, and what it was begun with."""

    def __init__(self, rm: Scorer, monkeypatch):
        self.go, self.begun, encode = threading.Event(), [], rm.encode

        def held(*given, **options):
            self.begun.append(given)
            self.go.wait(60)
            return encode(*given, **options)

        monkeypatch.setattr(rm, "encode", held)


def asks(count: int) -> list[Ask]:
    return [Ask({}, f"p{i}", ("a", "b")) for i in range(count)]


def test_time_counts_from_when_a_request_is_read(rm: Scorer, monkeypatch) -> None:
    held = Held(rm, monkeypatch)
    engine = Engine(rm, Limits(seconds=0.2), Metrics(), prefix_cache=0)
    with pytest.raises(TimeoutError):
        asyncio.run(engine.score(asks(20)))
    assert engine.waiting == 0
    held.go.set()
    engine.close()
    assert len(held.begun) == 4  # as many as there are threads: what had not begun is left


def test_of_a_request_with_a_bad_query_the_rest_is_left(rm: Scorer, monkeypatch) -> None:
    held = Held(rm, monkeypatch)
    engine = Engine(rm, Limits(), Metrics(), prefix_cache=0)
    bad = Ask({"images[0]": b"none"}, "p", ("a",), name="query[0]")
    with pytest.raises(ValueError, match=r"query\[0\]: images\[0\]: image of 4 bytes"):
        asyncio.run(engine.score([bad, *asks(20)]))
    assert engine.waiting == 0
    held.go.set()
    engine.close()
    assert len(held.begun) <= 4


def test_an_empty_response_gets_the_reward_that_is_said(rm: Scorer) -> None:
    """Of a policy, in any shape of request; the others are scored as they would be without it."""
    mixed = [Ask({}, "p", ("", "a", " \n", "b")), Ask({}, "p", ("",), name="query[1]"), Ask({}, "q", ("a",))]
    engine = Engine(rm, Limits(), Metrics(), prefix_cache=0, empty_reward=-5.0)
    found = asyncio.run(engine.score(mixed))
    assert asyncio.run(engine.score(mixed[1:2]))[0].rewards == [-5.0]
    engine.close()
    a, b = rm.score(None, "p", ["a", "b"])
    (c,) = rm.score(None, "q", ["a"])
    for each, want in zip(found, ([-5.0, a, -5.0, b], [-5.0], [c]), strict=True):
        np.testing.assert_allclose(each.rewards, want, atol=1e-5)
    engine = Engine(rm, Limits(), Metrics(), prefix_cache=0)
    with pytest.raises(ValueError, match=r"query\[1\]: empty response"):
        asyncio.run(engine.score(mixed[1:]))
    engine.close()


def test_what_is_being_encoded_waits_too(rm: Scorer, monkeypatch) -> None:
    held = Held(rm, monkeypatch)
    engine = Engine(rm, Limits(queue=4), Metrics(), prefix_cache=0)

    async def check() -> None:
        first = asyncio.create_task(engine.score(asks(2)))
        await asyncio.sleep(0)
        assert engine.waiting == 2
        for more, proxy in ((asks(3), False), (asks(2), True), ([Ask({}, "p", ("a",) * 129)], False)):
            with pytest.raises(QueueFullError, match="2 groups wait, and [34] more are over the 4 that may"):
                await engine.score(more, proxy=proxy)
        second = asyncio.create_task(engine.score(asks(2)))
        await asyncio.sleep(0)
        assert engine.waiting == 4
        held.go.set()
        assert [len(found) for found in await asyncio.gather(first, second)] == [2, 2]
        assert engine.waiting == 0 and len(held.begun) == 4  # nothing of those that were refused

    asyncio.run(check())
    engine.close()


def test_a_request_of_more_than_may_wait_is_answered_when_none_waits(rm: Scorer) -> None:
    with TestClient(make_app(rm, "tiny", Limits(queue=4), warm=False)) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        answer = post(client, "/get_reward", {"query": [f"p{i} a" for i in range(9)], "prompts": ["p"] * 9})
        assert answer.status_code == 200 and len(answer.json()["rewards"]) == 9
        body = {"prompt": "p", "responses": [f"{i}" for i in range(192)], "proxy": True}  # three groups of each branch
        answer = post(client, "/v1/score", body)
        assert answer.status_code == 200 and answer.json()["proxy"] == pytest.approx(answer.json()["rewards"], abs=1e-5)


def test_too_much_at_once_is_told_to_come_back(rm: Scorer, monkeypatch) -> None:
    held = Held(rm, monkeypatch)
    body = {"prompt": "p", "responses": ["a"]}
    with TestClient(make_app(rm, "tiny", Limits(queue=1), warm=False)) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        first = threading.Thread(target=post, args=(client, "/v1/score", body))
        first.start()
        while not held.begun:
            time.sleep(0.01)
        answer = post(client, "/v1/score", body)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert "mmrm_groups_waiting 1.0" in client.get("/metrics").text
        held.go.set()
        first.join()
        assert post(client, "/v1/score", body).status_code == 200


# --- names ----------------------------------------------------------------------------------------------------------


def test_an_error_names_the_query_and_the_image(client: TestClient) -> None:
    broken = "data:image/png;base64,AAAA"
    shown = {"type": "image_url", "image_url": {"url": broken}}
    said = [{"role": "user", "content": [{"type": "text", "text": "p"}, shown]}, {"role": "assistant", "content": "a"}]
    for path, body, reason in (
        ("/get_reward", {"query": [QUERY] * 3 + [QUERY.replace("A<", "<")]}, "query[3]: empty response"),
        (
            "/get_reward",
            {"query": [QUERY] * 3, "images": [None, broken, None]},
            "query[1]: images[1]: image of 3 bytes",
        ),
        (
            "/get_reward",
            {"query": [QUERY] * 2, "images": [None, [data_url(png()), broken]]},
            "query[1]: images[1][1]: image of 3 bytes",
        ),
        ("/get_reward", {"query": [QUERY, QUERY.replace("Q", "Q " * 9000)]}, "query[1]: a conversation has"),
        ("/get_reward", {"query": [QUERY, QUERY.replace("Q", "\ud800")]}, "query[1]: broken text"),
        ("/classify", {"input": [QUERY, QUERY.replace("A<", "<")]}, "input[1]: empty response"),
        ("/classify", {"messages": said}, "messages[0].content[1].image_url.url: image of 3 bytes"),
        ("/v1/score", {"prompt": "p", "responses": ["a"], "images": [data_url(png()), broken]}, "images[1]: image of"),
        ("/v1/rerank", {"query": {"content": [shown]}, "documents": ["a"]}, "query.content[0].image_url.url: image of"),
    ):
        answer = post(client, path, body)
        assert answer.status_code == 422 and answer.json()["detail"].startswith(reason), answer.text
