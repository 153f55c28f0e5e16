"""`mmrm serve`: load, listen, drain."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Literal

import uvicorn
from rich.console import Console

from mmrm_jax.config import MeshConfig
from mmrm_jax.eval.scorer import holds_proxy, open_scorer, with_proxy
from mmrm_jax.serve.app import make_app
from mmrm_jax.serve.prefixes import Prefixes
from mmrm_jax.serve.settings import Limits
from mmrm_jax.sharding import make_mesh

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Path,
    *,
    name: str | None,
    host: str,
    port: int,
    token_file: Path | None,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int,
    limits: Limits,
    prefix_cache_mib: int,
    empty_reward: float | None,
    console: Console,
) -> None:
    """Serve until SIGTERM or Ctrl-C; then no more requests are taken, and those under way are answered.

    Raises ValueError where the folder is no reward model, the token is empty, a size is below 0, or the address cannot
    be listened on.
    """
    if prefix_cache_mib < 0:
        raise ValueError(f"prefix_cache_mib is {prefix_cache_mib}; it must be at least 0")
    if empty_reward is not None and not math.isfinite(empty_reward):
        raise ValueError(f"empty_reward is {empty_reward}; it must be finite")
    token = None if token_file is None else token_file.read_text(encoding="utf-8").strip()
    if token == "":
        raise ValueError(f"{token_file} is empty; it must hold the token that clients are to send")
    with _listen(host, port) as listener:
        scorer, _ = open_scorer(model, make_mesh(MeshConfig()), dtype, batch_size, None)
        if holds_proxy(model):
            scorer = with_proxy(scorer)
        else:
            console.print("no proxy in the folder: only the model's own rewards are served")
        if host not in LOCAL and token is None:
            console.print(
                f"{host} can be reached from other machines, and anyone may ask: give --token-file", style="yellow"
            )
        app = make_app(
            scorer,
            name or model.resolve().name,
            limits,
            token=token,
            prefix_cache=prefix_cache_mib * 2**20,
            empty_reward=empty_reward,
            on_ready=lambda: console.print("ready: common shapes are compiled"),
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        console.print(f"{address}  page at /, OpenAPI at /docs, ready at /ready", highlight=False)
        kept = Prefixes(scorer, prefix_cache_mib * 2**20).tokens
        console.print(f"up to {kept:,} tokens of prompts and images are kept (--prefix-cache-mib)", highlight=False)
        seconds = round(limits.seconds)
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=seconds,
            timeout_keep_alive=30,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket of the address, before anything is loaded. Raises ValueError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; it must be from 0 to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be listened on: {error}; is another server there?") from error
