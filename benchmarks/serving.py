"""`mmrm serve` under load: latency, throughput beside scoring without a server, what best-of-64 costs, and what one
response costs when its image is new, when its prompt is, and when both were there before.

    python benchmarks/serving.py --size big --json serving.json

A server in a process of its own, and clients that ask again as soon as they are answered. Every answer is compared with
what the same model gives in this process. Throughput is compared with `mmrm_jax.load(...).score_many` of the same
requests at the same batch size, measured before, on a machine that does nothing else. The clients share the machine
with the server, which has to do their JSON and images besides.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import tyro
from common import SIZES
from PIL import Image
from rich.console import Console
from rich.table import Table

import mmrm_jax
from mmrm_jax.models.hf.config import config_to_hf, read_config
from mmrm_jax.models.hf.weights import save_params
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.state import init_params

Request = tuple[bytes, str, list[str]]


@dataclasses.dataclass(frozen=True)
class Serving:
    """Attributes:
    size: Of the model: small, the packaged one's, or big.
    clients: That ask at once.
    seconds: Of load that is measured; a third of it goes before, for compilations.
    batch_size: Most requests that run together.
    responses: Of a request.
    repeats: Of each time of a single request; medians are shown.
    json: File for the numbers.
    """

    size: Literal["small", "big"] = "small"
    clients: int = 32
    seconds: float = 60.0
    batch_size: int = 8
    responses: int = 4
    repeats: int = 5
    json: Path | None = None


def make_model(size: str, folder: Path) -> None:
    """A random reward model, with the packaged model's tokenizer: of its size, or of the benchmarks' big one."""
    from ours import model_config

    config = read_config(MODEL_DIR) if size == "small" else model_config(SIZES[size])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(MODEL_DIR / name, folder)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, template="chatml-plain", max_tiles=1)))
    save_params(folder, config, init_params(config, 0))


def make_requests(count: int, responses: int, side: int, seed: int = 0) -> list[Request]:
    """Requests of one shape, each with a photo-sized image of noise of its own."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, format="JPEG")
        answers = [f"It is a {rng.integers(100, 999)} of {rng.integers(100, 999)}." for _ in range(responses)]
        found.append((buffer.getvalue(), f"What is in picture {100 + i}?", answers))
    return found


def body(request: Request) -> dict[str, Any]:
    image, prompt, responses = request
    url = "data:image/jpeg;base64," + base64.b64encode(image).decode()
    return {"prompt": prompt, "responses": responses, "images": [url]}


@contextmanager
def server(folder: Path, batch_size: int) -> Iterator[str]:
    """`mmrm serve` on a free port, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from mmrm_jax.cli import main; main()"
    arguments = ["serve", "--model", str(folder), "--port", str(port), "--batch-size", str(batch_size)]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                if process.poll() is not None:
                    raise SystemExit("the server did not start") from None
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(90)


def load(url: str, requests: list[Request], want: list[np.ndarray], clients: int, seconds: float) -> dict[str, Any]:
    """Latencies of `clients` that ask for `seconds`, how many asked, and how many answers were wrong or missing."""
    bodies = [json.dumps(body(request)) for request in requests]
    headers = {"Content-Type": "application/json"}
    end = time.monotonic() + seconds

    def ask(number: int) -> tuple[list[float], int, int]:
        rng, taken, wrong, failed = np.random.default_rng(number), [], 0, 0
        with httpx.Client(base_url=url, timeout=120) as client:
            while time.monotonic() < end:
                i = int(rng.integers(len(bodies)))
                started = time.monotonic()
                answer = client.post("/v1/score", content=bodies[i], headers=headers)
                taken.append(time.monotonic() - started)
                if answer.status_code != 200:
                    failed += 1
                elif not np.allclose(answer.json()["rewards"], want[i], atol=1e-5):
                    wrong += 1
        return taken, wrong, failed

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(clients)))
    spent = time.monotonic() - started
    latencies = np.concatenate([taken for taken, _, _ in found])
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).tolist()
    return {
        "requests": len(latencies),
        "requests_per_s": len(latencies) / spent,
        "p50_s": p50,
        "p95_s": p95,
        "p99_s": p99,
        "wrong": sum(wrong for _, wrong, _ in found),
        "failed": sum(failed for _, _, failed in found),
    }


def median_seconds(url: str, request: Request, repeats: int) -> float:
    """Of one request when nobody else asks, after a first one that compiles."""
    taken = []
    for _ in range(repeats + 1):
        started = time.monotonic()
        httpx.post(f"{url}/v1/score", json=body(request), timeout=300).raise_for_status()
        taken.append(time.monotonic() - started)
    return float(np.median(taken[1:]))


def one_response(url: str, side: int, repeats: int) -> dict[str, float]:
    """Median seconds of a request of one response about a new image, a new prompt, and neither; nobody else asks."""
    taken: dict[str, list[float]] = {"image": [], "prompt": [], "neither": []}
    for i in range(repeats + 1):
        ((image, prompt, answers),) = make_requests(1, 2, side, seed=100 + i)
        asks = ((prompt, answers[0]), (prompt + " And why?", answers[0]), (prompt, answers[1]))
        for new, (asked, answer) in zip(taken, asks, strict=True):
            started = time.monotonic()
            sent = httpx.post(f"{url}/v1/score", json=body((image, asked, [answer])), timeout=300)
            sent.raise_for_status()
            taken[new].append(time.monotonic() - started)
    return {new: float(np.median(times[1:])) for new, times in taken.items()}


def offline(folder: Path, requests: list[Request], options: Serving) -> tuple[list[np.ndarray], float]:
    """(rewards, requests a second) of `score_many` in this process."""
    rm = mmrm_jax.load(folder, batch_size=options.batch_size)
    want = rm.score_many(requests)
    taken = []
    for _ in range(options.repeats):
        started = time.monotonic()
        rm.score_many(requests)
        taken.append(time.monotonic() - started)
    return want, len(requests) / float(np.median(taken))


def main() -> None:
    """Measure, print, write."""
    options = tyro.cli(Serving, description=__doc__)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(options.size, folder)
        side = read_config(folder).vision.image_size
        requests = make_requests(8 * options.batch_size, options.responses, side)
        want, alone = offline(folder, requests, options)
        with server(folder, options.batch_size) as url:
            load(url, requests, want, options.clients, options.seconds / 3)
            found = load(url, requests, want, options.clients, options.seconds)
            alike = one_response(url, side, options.repeats)
            times = {n: median_seconds(url, make_requests(1, n, side)[0], options.repeats) for n in (1, 32, 64)}
    slope = (times[64] - times[32]) / 32
    result = found | {
        "offline_requests_per_s": alone,
        "of_offline": found["requests_per_s"] / alone,
        "seconds_by_responses": times,
        "seconds_by_what_is_new": alike,
        "best_of_64_over_its_responses": times[64] / (64 * slope),
    }
    table = Table(title=f"mmrm serve, {options.size}, {options.clients} clients, {options.seconds:g} s")
    for heading in ("requests", "a second", "of offline", "p50", "p95", "p99", "failed", "wrong"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{found['requests']}",
        f"{found['requests_per_s']:.1f}",
        f"{result['of_offline']:.2f}x",
        *(f"{1000 * found[key]:.0f} ms" for key in ("p50_s", "p95_s", "p99_s")),
        f"{found['failed']}",
        f"{found['wrong']}",
    )
    console.print(table)
    alone = Table(title="a request that nobody else is beside")
    for heading in ("new image", "new prompt", "neither new", "best of 64, prompt not new"):
        alone.add_column(heading, justify="right")
    alone.add_row(
        *(f"{1000 * seconds:.0f} ms" for seconds in alike.values()),
        f"{times[64]:.2f} s, {result['best_of_64_over_its_responses']:.2f}x its responses",
    )
    console.print(alone)
    if options.json is not None:
        options.json.write_text(json.dumps({"results": {"serving": result}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
