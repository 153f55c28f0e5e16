"""What stands before every endpoint: who may ask, how much a body may hold, how long it may take to arrive."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mmrm_jax.serve.metrics import Metrics
from mmrm_jax.serve.settings import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready")  # without a token


class Guard:
    """Reads a request's body whole, within bounds, before the application sees any of it; counts what is answered."""

    def __init__(self, app: App, *, limits: Limits, token: str | None, metrics: Metrics, paths: frozenset[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection's request; what is no HTTP goes by."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        started = time.monotonic()
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if (problem := self._refused(scope)) is not None:
                await refuse(counted, *problem)
                return
            try:
                body = await asyncio.wait_for(self._body(receive), self.limits.seconds)
            except TimeoutError:
                await refuse(counted, 408, f"the body did not arrive within {self.limits.seconds:g} s")
                return
            if body is None:
                await refuse(counted, 413, self._too_large())
                return
            started = time.monotonic()
            await self.app(scope, _replay(body, receive), counted)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _refused(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        """Status and reason, where the headers alone are enough to refuse."""
        headers = dict(scope["headers"])
        if self.token is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.token):
                return 401, "this server asks for a token: Authorization: Bearer TOKEN"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "Content-Length is no number"
        if int(length) > self._bytes:
            return 413, self._too_large()
        return None

    @property
    def _bytes(self) -> int:
        return int(self.limits.body_mib * 2**20)

    def _too_large(self) -> str:
        return f"the body has more than {self.limits.body_mib:g} MiB"

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where it is larger than allowed, whatever the headers said."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._bytes:
                return None
            if not message.get("more_body"):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body at once, and then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with a status and a reason."""
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
