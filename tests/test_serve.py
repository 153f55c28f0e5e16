"""`mmrm serve`: the rewards of `mmrm score` in every client's shape, many at once, and what it refuses."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from commands import run, write_pairs, xla_flags
from pictures import bomb, data_url, png

import mmrm_jax
from mmrm_jax.data.templates import TEMPLATES
from mmrm_jax.eval.scorer import Scorer
from mmrm_jax.serve.app import make_app
from mmrm_jax.serve.asks import rendered
from mmrm_jax.serve.batcher import Batcher, QueueFullError
from mmrm_jax.serve.prefixes import Asked, Prefixes
from mmrm_jax.serve.settings import Limits

CLOSE = 1e-5
LIMITS = Limits(body_mib=1.0, pixels=40_000, images=3, responses=100, characters=20_000, queue=64, seconds=60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A reward model with its proxy, trained for a few steps."""
    from mmrm_jax import cli

    folder = tmp_path_factory.mktemp("serve")
    data = write_pairs(folder, "a", 16)
    train = ["train", "--data", data, "--out", folder / "run", "--steps", 4, "--batch-size", 8, "--data.holdout", 0]
    train += ["--data.buckets", 1, "--objective", "shortcut_aware", "--optimizer.learning-rate", "1e-2"]
    cli.run([*map(str, train)])
    cli.run(["export", "--run", str(folder / "run"), "--out", str(folder / "model"), "--proxy"])
    return folder / "model"


@pytest.fixture(scope="module")
def rm(model: Path) -> Scorer:
    return mmrm_jax.load(model, proxy=True, batch_size=8)


class Running:
    """A server on a free port in a thread of this process."""

    def __init__(self, scorer: Scorer, limits: Limits = LIMITS, **options):
        self.app = make_app(scorer, "tiny", limits, **options)
        config = uvicorn.Config(self.app, port=0, log_level="error", lifespan="on")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        self.port = port

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.client.close()


@pytest.fixture(scope="module")
def server(rm: Scorer) -> Iterator[Running]:
    running = Running(rm, warm=False)
    while running.client.get("/ready").status_code != 200:
        time.sleep(0.05)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Running) -> httpx.Client:
    return server.client


RESPONSES = ["It is red.", "It is blue, as one can see in the picture.", "No."]


# --- every shape ----------------------------------------------------------------------------------------------------


def test_native_scores_are_the_models(client: httpx.Client, rm: Scorer) -> None:
    image = png()
    want = rm.score(image, "Colour?", RESPONSES)
    body = {"prompt": "Colour?", "responses": RESPONSES, "images": [data_url(image)], "proxy": True}
    answer = client.post("/v1/score", json=body).json()
    assert answer["model"] == "tiny"
    np.testing.assert_allclose(answer["rewards"], want, atol=CLOSE)
    (text,) = rm.score_many([(image, "Colour?", RESPONSES)], "proxy")
    np.testing.assert_allclose(answer["proxy"], text, atol=CLOSE)
    form = {"prompt": "Colour?", "responses": RESPONSES}
    sent = client.post("/v1/score/upload", data=form, files={"images": ("a.png", image, "image/png")}).json()
    assert sent == {**answer, "proxy": None}
    alone = client.post("/v1/score", json={"prompt": "Colour?", "responses": RESPONSES[:1]}).json()
    np.testing.assert_allclose(alone["rewards"], rm.score(None, "Colour?", RESPONSES[:1]), atol=CLOSE)
    several = body | {"prompt": "<image> or <image>?", "images": [data_url(png(1)), data_url(png(2))]}
    want = rm.score([png(1), png(2)], "<image> or <image>?", RESPONSES)
    np.testing.assert_allclose(client.post("/v1/score", json=several).json()["rewards"], want, atol=CLOSE)


def test_open_rlhf_gets_its_rewards(client: httpx.Client, rm: Scorer) -> None:
    """What its remote reward model client posts: rendered conversations, their prompts, and labels."""
    template = rm.checkpoint.processor.chat.template
    text = "".join(p if isinstance(p, str) else p.token for p in template.pieces(("Colour?",), (), RESPONSES[0]))
    prompt = text[: text.index(RESPONSES[0])]
    body = {"query": [text, prompt + RESPONSES[1], "Why? Because."], "prompts": [prompt, prompt, "Why? "]}
    answer = client.post("/get_reward", json=body | {"labels": ["", None, "x"]}).json()
    want = [*rm.score(None, "Colour?", RESPONSES[:2]), *rm.score(None, "Why? ", ["Because."])]
    np.testing.assert_allclose(answer["rewards"], want, atol=CLOSE)
    assert answer["scores"] == answer["rewards"] and answer["extra_logs"] == {}
    image = png()
    shown = client.post("/get_reward", json=body | {"images": [data_url(image), None, [data_url(image)]]}).json()
    np.testing.assert_allclose(shown["rewards"][0], rm.score(image, "Colour?", RESPONSES[:1])[0], atol=CLOSE)
    assert shown["rewards"][1] == pytest.approx(answer["rewards"][1], abs=CLOSE)


def test_vllm_clients_get_theirs(client: httpx.Client, rm: Scorer) -> None:
    image = png()
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": "Colour?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": RESPONSES[0]}]
    (want,) = rm.score(image, "Colour?", RESPONSES[:1])
    # verl reads data[-1].probs[-1], the reward itself where the activation is off.
    asked = {"model": "tiny", "messages": messages}
    raw = client.post("/classify", json=asked | {"activation": False}).json()["data"][-1]
    assert raw["probs"][-1] == pytest.approx(want, abs=CLOSE) and raw["num_classes"] == 1
    squashed = client.post("/classify", json=asked).json()["data"][-1]["probs"][-1]
    assert squashed == pytest.approx(1 / (1 + np.exp(-want)), abs=CLOSE)
    parts[1]["text"] = "<image>\nColour?"  # its place, as vLLM takes it
    placed = client.post("/classify", json=asked | {"activation": False}).json()["data"][-1]
    assert placed["probs"] == pytest.approx(raw["probs"], abs=CLOSE)
    parts[1]["text"] = "Is <image> the same as <image>?"
    refused = client.post("/classify", json=asked)
    assert refused.status_code == 422 and "1 image(s), and 2 <image> in its text" in refused.json()["detail"]
    parts[1]["text"] = "Colour?"
    pooled = client.post("/pooling", json=asked).json()
    assert pooled["data"][0]["data"] == pytest.approx([want], abs=CLOSE)
    template = rm.checkpoint.processor.chat.template
    texts = [
        "".join(p if isinstance(p, str) else p.token for p in template.pieces(("Colour?",), (), r)) for r in RESPONSES
    ]
    found = client.post("/classify", json={"input": texts, "activation": False}).json()
    values = [each["probs"][0] for each in found["data"]]
    np.testing.assert_allclose(values, rm.score(None, "Colour?", RESPONSES), atol=CLOSE)
    assert found["usage"]["total_tokens"] > found["usage"]["prompt_tokens"] > 0


def test_documents_are_ranked(client: httpx.Client, rm: Scorer) -> None:
    rewards = rm.score(None, "Colour?", RESPONSES)
    order = np.argsort(-rewards).tolist()
    answer = client.post("/v1/rerank", json={"model": "tiny", "query": "Colour?", "documents": RESPONSES}).json()
    assert [each["index"] for each in answer["results"]] == order
    assert [each["document"]["text"] for each in answer["results"]] == [RESPONSES[i] for i in order]
    np.testing.assert_allclose([each["relevance_score"] for each in answer["results"]], rewards[order], atol=CLOSE)
    two = client.post("/v1/rerank", json={"query": "Colour?", "documents": RESPONSES, "top_n": 2}).json()
    assert [each["index"] for each in two["results"]] == order[:2]
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_rendered_conversation_is_read_back(name: str) -> None:
    template = TEMPLATES[name]
    text = "".join(p if isinstance(p, str) else p.token for p in template.pieces(("What?\nNow",), (), "A.\nB"))
    assert rendered(text, template) == ["What?\nNow", "A.\nB"]
    assert rendered("What? " + text, template) is None and rendered("", template) is None


# --- many at once ---------------------------------------------------------------------------------------------------


def test_clients_at_once_get_their_own_answers(client: httpx.Client, rm: Scorer) -> None:
    rng = np.random.default_rng(0)
    asks = []
    for i in range(48):
        image = png(i % 5) if i % 3 else None
        asks.append((image, f"Question {i}?", [f"Answer {i}.{k}" for k in range(int(rng.integers(1, 6)))]))
    want = rm.score_many(asks)

    def post(ask) -> list[float]:
        image, prompt, responses = ask
        body = {"prompt": prompt, "responses": responses, "images": [data_url(image)] if image else []}
        answer = client.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["rewards"]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(post, asks))
    for got, expected in zip(found, want):
        np.testing.assert_allclose(got, expected, atol=CLOSE)
    text = client.get("/metrics").text
    scored = [line for line in text.splitlines() if line.startswith("mmrm_responses_scored_total")]
    assert float(scored[0].split()[-1]) >= sum(len(ask[2]) for ask in asks)
    assert 'mmrm_requests_total{path="/v1/score",status="200"}' in text and "mmrm_ready 1.0" in text


def test_what_waits_together_runs_together(rm: Scorer) -> None:
    sizes: list[int] = []
    batcher = Batcher(Prefixes(rm, 2**20), wait=0.2, on_batch=lambda groups, _: sizes.append(groups))
    groups = [Asked(rm.encode([], f"Question {i}?", ["An answer."], alone=True)[0]) for i in range(10)]
    futures = batcher.submit(groups)
    futures[3].cancel()
    found = [future.result(60) for i, future in enumerate(futures) if i != 3]
    assert sizes in ([7, 2], [8, 2], [8, 1])  # a full batch of eight, and the rest; one of them is cancelled
    for i, rewards in zip((i for i in range(10) if i != 3), found):
        np.testing.assert_allclose(rewards, rm.score(None, f"Question {i}?", ["An answer."]), atol=CLOSE)
    late = batcher.submit(groups[:1])
    batcher.close()
    assert late[0].done()  # closing answers what waits
    with pytest.raises(QueueFullError, match="stopping"):
        batcher.submit(groups[:1])


# --- who may ask, and what is refused -------------------------------------------------------------------------------


def test_a_token_is_asked_for(rm: Scorer) -> None:
    running = Running(rm, token="secret", warm=False)
    body = {"prompt": "p", "responses": ["a"]}
    while running.client.get("/ready").status_code != 200:
        time.sleep(0.05)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        answer = running.client.post("/v1/score", json=body, headers=headers)
        assert answer.status_code == 401 and "Bearer TOKEN" in answer.json()["detail"]
    assert running.client.get("/metrics").status_code == running.client.get("/docs").status_code == 401
    assert running.client.get("/health").status_code == running.client.get("/").status_code == 200
    assert running.client.post("/v1/score", json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
    running.stop()


GOOD = {"prompt": "p", "responses": ["a"]}
BAD = {
    "a path": (GOOD | {"images": ["/etc/passwd"]}, "nothing is fetched"),
    "a file URL": (GOOD | {"images": ["file:///etc/passwd"]}, "nothing is fetched"),
    "a web address": (GOOD | {"images": ["http://169.254.169.254/latest/meta-data"]}, "nothing is fetched"),
    "a path in base64's place": (GOOD | {"images": ["data:image/png;base64,../../etc/passwd!"]}, "not valid base64"),
    "no image": (GOOD | {"images": [data_url(b"text")]}, "image"),
    "half an image": (GOOD | {"images": [data_url(png()[:60])]}, "image"),
    "a decompression bomb": (GOOD | {"images": [data_url(bomb())]}, "pixels"),
    "too many pixels": (GOOD | {"images": [data_url(png(0, (300, 300)))]}, "pixels"),
    "too many images": (GOOD | {"images": [data_url(png())] * 4}, "4 images; at most 3"),
    "too many responses": (GOOD | {"responses": ["a"] * 101}, "101 responses; at most 100"),
    "a long prompt": (GOOD | {"prompt": "p" * 30_000}, "at most 20000"),
    "over the token budget": (GOOD | {"prompt": "a " * 9500}, "tokens"),
    "no responses": ({"prompt": "p", "responses": []}, "responses"),
    "an empty response": (GOOD | {"responses": [" "]}, "empty response"),
    "a number for a text": (GOOD | {"prompt": 3}, "prompt"),
    "an unknown field": (GOOD | {"promt": "p"}, "promt"),
    "half of a surrogate pair": (GOOD | {"prompt": "\ud800"}, "surrogate"),
    "no prompt and no image": (GOOD | {"prompt": ""}, "empty prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_scored_is_refused_with_a_reason(client: httpx.Client, case: str) -> None:
    body, reason = BAD[case]
    answer = client.post("/v1/score", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and reason in answer.json()["detail"], answer.text
    assert client.post("/v1/score", json=GOOD).status_code == 200


def test_bodies_that_are_none(client: httpx.Client) -> None:
    json_type = {"Content-Type": "application/json"}
    for content in (b"", b"{", b"\xff\xfe", b'{"prompt": NaN, "responses": ["a"]}', b"[" * 50_000, b"null", b"[1]"):
        answer = client.post("/v1/score", content=content, headers=json_type)
        assert answer.status_code in (400, 422) and answer.json()["detail"], content
    nested = client.post("/v1/score", content=b"[" * 100_000, headers=json_type)  # more values than can be scored
    assert nested.status_code == 413 and "brackets" in nested.json()["detail"]
    large = client.post("/v1/score", content=b"x" * (2**20 + 1), headers=json_type)
    assert large.status_code == 413 and "1 MiB" in large.json()["detail"]

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    with contextlib.suppress(httpx.WriteError):  # where it stopped listening meanwhile
        assert client.post("/v1/score", content=endless()).status_code == 413  # no Content-Length tells beforehand
    for asked in ({}, {"messages": [], "input": []}, {"input": []}, {"input": "no conversation"}):
        answer = client.post("/classify", json=asked)
        assert answer.status_code == 422 and answer.json()["detail"], asked
    roles = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "p"}]
    answer = client.post("/classify", json={"messages": roles})
    assert answer.status_code == 422 and "system, user" in answer.json()["detail"]
    assert client.post("/v1/score", json=GOOD).status_code == 200


def test_a_slow_client_is_let_go(rm: Scorer) -> None:
    running = Running(rm, Limits(seconds=0.5), warm=False)
    with socket.create_connection(("127.0.0.1", running.port)) as slow:
        slow.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        slow.settimeout(10)
        answer = slow.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408"), answer
    assert running.client.get("/health").status_code == 200
    running.stop()


def test_every_endpoint_keeps_its_openapi_promises(server: Running) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    codes: set[int] = set()

    few = settings(max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    for operation in schema.get_all_operations():

        @few
        @given(case=operation.ok().as_strategy())
        def holds(case) -> None:
            answer = case.call(base_url=str(server.client.base_url))
            codes.add(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 503, answer.text

        holds()
    assert codes & {422, 400} and server.client.post("/v1/score", json=GOOD).status_code == 200


def test_the_page_is_whole_and_fetches_nothing(client: httpx.Client) -> None:
    page = client.get("/")
    assert "const proxy = true" in page.text and "http://" not in page.text and "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = "the page in a browser needs Chromium and playwright: apt install chromium; pip install playwright"


@pytest.mark.skipif(CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason=NO_BROWSER)
def test_the_page_ranks_responses_in_a_browser(server: Running, rm: Scorer, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    image, dropped = png(), png(1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.goto(str(server.client.base_url))
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": image})
        page.wait_for_selector("#drop img")
        page.fill("#prompt", "Colour?")
        page.click("#more")
        for area, text in zip(page.query_selector_all("#responses textarea"), RESPONSES):
            area.fill(text)

        def shown() -> list[tuple[str, ...]]:
            with page.expect_response("**/v1/score", timeout=120_000):
                page.click("#go")
            page.wait_for_selector("#go:not([disabled])")
            rows = page.query_selector_all("#ranking tbody tr")
            return [tuple(cell.inner_text().strip() for cell in row.query_selector_all("td")) for row in rows]

        def ranked(picture: bytes) -> list[tuple[str, ...]]:
            rewards = rm.score(picture, "Colour?", RESPONSES)
            (text,) = rm.score_many([(picture, "Colour?", RESPONSES)], "proxy")
            order = np.argsort(-rewards).tolist()
            return [
                (f"{place}", RESPONSES[i], f"{rewards[i]:.3f}", f"{text[i]:.3f}") for place, i in enumerate(order, 1)
            ]

        assert shown() == ranked(image)
        if folder := os.environ.get("MMRM_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/page.png", full_page=True)
        # Another picture is dropped, as from a folder.
        page.evaluate(
            """url => {
                const bytes = Uint8Array.from(atob(url.split(",")[1]), c => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], "b.png", {type: "image/png"}));
                const event = new DragEvent("drop", {dataTransfer: data, bubbles: true});
                document.getElementById("drop").dispatchEvent(event);
            }""",
            data_url(dropped),
        )
        page.wait_for_selector("#drop img[alt='b.png']")
        assert shown() == ranked(dropped)
        # What the server refuses is said, and markup in a response stays text.
        page.fill("#prompt", "a " * 15_000)
        shown()
        assert "at most 20000" in page.inner_text("#problem")
        page.fill("#prompt", "Colour?")
        page.query_selector_all("#responses textarea")[0].fill("<img src=x onerror=alert(1)>")
        assert any(row[1] == "<img src=x onerror=alert(1)>" for row in shown())
        assert [p for p in problems if "422" not in p] == []
        browser.close()


# --- as a command ---------------------------------------------------------------------------------------------------


def test_the_command_serves_drains_and_ends(model: Path, tmp_path: Path, capsys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from mmrm_jax.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--model", str(model), "--port", str(port), "--name", "rm"]
    process = subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": xla_flags(1)})
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if client.get("/ready").status_code == 200:
                break
        except httpx.ConnectError:
            assert process.poll() is None
        time.sleep(0.1)
    many = {"prompt": "p", "responses": [f"Answer {i}, as one can see in the picture." for i in range(400)]}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(client.post, "/v1/score", json=many)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        answer = under_way.result()
    assert answer.status_code == 200 and len(answer.json()["rewards"]) == 400
    client.close()
    assert process.wait(60) in (0, -signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (tmp_path / "token").write_text("\n")
        for more, value, message in (
            ("--token-file", tmp_path / "token", "is empty"),
            ("--limits.queue", 0, "limits.queue is 0; it must be above 0"),
            ("--port", taken.getsockname()[1], "cannot be listened on: [Errno 98] Address already in use"),
            ("--port", 99_999, "port is 99999; it must be from 0 to 65535"),
        ):
            status, text = run(capsys, "serve", "--model", model, more, value)
            assert status == 2 and message in " ".join(text.split()), text
