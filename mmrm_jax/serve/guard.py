"""What stands before every endpoint: who may ask, how much a body may hold, how long it may take to arrive."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mmrm_jax.serve.metrics import Metrics
from mmrm_jax.serve.settings import LONGEST, Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready")  # without a token, and without a body


class Guard:
    """Reads a request's body whole, within bounds, before the application sees any of it; counts what is answered.

    `held` are the bytes of all bodies whose requests are not answered yet.
    """

    def __init__(self, app: App, *, limits: Limits, token: str | None, metrics: Metrics, paths: frozenset[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.token = None if token is None else token.encode()
        self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection's request; what is no HTTP goes by."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        started = time.monotonic()
        status = 500
        body = bytearray()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            problem = self._refused(scope)
            if problem is None and path not in (*OPEN_PATHS, "other"):
                problem = await self._read(receive, body) or self._overfull(scope, body)
            if problem is not None:
                await refuse(counted, *problem)
                return
            started = time.monotonic()
            await self.app(scope, _replay(body, receive), counted)
        finally:
            self.held -= len(body)
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
        return self._too_large(int(length))

    def _too_large(self, size: int) -> tuple[int, str] | None:
        most = self.limits.body_mib
        return (413, f"the body has more than {most:g} MiB") if size > most * 2**20 else None

    async def _read(self, receive: Receive, body: bytearray) -> tuple[int, str] | None:
        """Fill `body`; status and reason where it is too large, whatever the headers said, too slow, or too many are
        read at once."""
        most, more = self.limits.bodies_mib, True
        try:
            async with asyncio.timeout(self.limits.seconds):
                while more:
                    message = await receive()
                    part = message.get("body", b"")  # none where the client went away
                    body.extend(part)
                    self.held += len(part)
                    if (problem := self._too_large(len(body))) is not None:
                        return problem
                    if self.held > most * 2**20:
                        return 429, f"the bodies of all requests have more than {most:g} MiB"
                    more = message.get("more_body", False)
        except TimeoutError:
            return 408, f"the body did not arrive within {self.limits.seconds:g} s"
        return None

    def _overfull(self, scope: MutableMapping[str, Any], body: bytearray) -> tuple[int, str] | None:
        """Status and reason, where JSON or a form has more values than could be scored, before they are read into
        memory: whatever is no part of a text has one of these before it."""
        most = self.limits.characters + LONGEST
        uploaded = dict(scope["headers"]).get(b"content-type", b"").lower().startswith(b"multipart/")
        if uploaded or sum(map(body.count, (b",", b"[", b"{", b"&"))) <= most:
            return None
        return 413, f"the body has more than {most} commas and brackets: more texts or characters than can be scored"


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A `receive` that gives this body at once, and then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with a status and a reason."""
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413, 429):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
