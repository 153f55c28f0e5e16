"""Asks to rewards: checked, encoded on threads, batched, and waited for."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from mmrm_jax.eval.scorer import Branch, Scorer
from mmrm_jax.serve.asks import Ask
from mmrm_jax.serve.batcher import Batcher, QueueFullError
from mmrm_jax.serve.metrics import Metrics
from mmrm_jax.serve.pictures import Pictures
from mmrm_jax.serve.prefixes import Asked, Prefixes
from mmrm_jax.serve.settings import Limits

T = TypeVar("T")

THREADS = 4  # that decode images and tokenise


@dataclasses.dataclass(frozen=True)
class Found:
    """The rewards of an ask, those of the proxy where they were asked for, and how many tokens were scored."""

    rewards: list[float]
    proxy: list[float] | None
    prompt_tokens: int
    tokens: int


class Engine:
    """One model behind its batcher."""

    def __init__(
        self,
        scorer: Scorer,
        limits: Limits,
        metrics: Metrics,
        *,
        prefix_cache: int,
        empty_reward: float | None = None,
    ):
        self.scorer, self.limits, self.metrics, self.empty_reward = scorer, limits, metrics, empty_reward
        self.prefixes = Prefixes(scorer, prefix_cache)
        self.batcher = Batcher(self.prefixes, on_batch=metrics.on_batch)
        self.encoding = 0  # groups that are decoded and tokenised, or wait for that
        self.pictures = Pictures(scorer, limits.pixels)
        self.pool = ThreadPoolExecutor(THREADS, "encoder")
        metrics.waiting.set_function(lambda: self.waiting)
        metrics.image_hits.set_function(lambda: self.pictures.kept.hits)
        metrics.prefix_hits.set_function(lambda: self.prefixes.kept.hits)

    @property
    def has_proxy(self) -> bool:
        """Whether the model's folder holds a proxy."""
        return "proxy" in self.scorer.views

    @property
    def waiting(self) -> int:
        """Groups that were let in, and that the model has not begun with."""
        return self.encoding + len(self.batcher)

    async def score(self, asks: Sequence[Ask], *, proxy: bool = False) -> list[Found]:
        """The rewards of each ask, in order; where there is an `empty_reward`, that of an empty response.

        Raises ValueError where something cannot be scored, QueueFullError where too much waits, TimeoutError where it
        took too long.
        """
        self._check(asks)
        if proxy and not self.has_proxy:
            raise ValueError("proxy: this model's folder holds no proxy; mmrm export --proxy writes one")
        if (empty := self.empty_reward) is None:
            return await self._score(asks, proxy)
        said = [dataclasses.replace(ask, responses=tuple(filter(str.strip, ask.responses))) for ask in asks]
        asked = [ask for ask in said if ask.responses]
        found = iter(await self._score(asked, proxy) if asked else ())
        scored = (next(found) if ask.responses else Found([], [] if proxy else None, 0, 0) for ask in said)
        return [_with_empty(ask, each, empty) for ask, each in zip(asks, scored, strict=True)]

    async def _score(self, asks: Sequence[Ask], proxy: bool) -> list[Found]:
        branches: tuple[Branch, ...] = ("primary", "proxy") if proxy else ("primary",)
        async with asyncio.timeout(self.limits.seconds):
            encoded = await self._encoded(asks, branches)
            groups = [group for parts in encoded for group in parts]
            rewards = await _all(map(asyncio.wrap_future, self.batcher.submit(groups, branches)))
        self.metrics.responses.inc(sum(len(ask.responses) for ask in asks))
        by_branch = [rewards[: len(groups)], rewards[len(groups) :]]
        return [self._found(parts, by_branch, proxy) for parts in _slices(encoded)]

    async def _encoded(self, asks: Sequence[Ask], branches: Sequence[Branch]) -> list[list[Asked]]:
        """The groups of each ask. Raises QueueFullError, before anything is done, where others wait and with these
        groups more would than may."""
        most, waiting = self.scorer.ladder.responses, self.waiting
        more = sum(-(-len(ask.responses) // most) for ask in asks) * len(branches)
        if waiting and waiting + more > self.limits.queue:
            raise QueueFullError(f"{waiting} groups wait, and {more} more are over the {self.limits.queue} that may")
        loop, proxy = asyncio.get_running_loop(), "proxy" in branches
        self.encoding += more
        try:
            return await _all([loop.run_in_executor(self.pool, self._encode, ask, proxy) for ask in asks])
        finally:
            self.encoding -= more

    def _found(self, place: tuple[slice, list[Asked]], by_branch: list[list], proxy: bool) -> Found:
        where, parts = place
        primary, text = (np.concatenate(rows[where]).tolist() if rows else None for rows in by_branch)
        assert primary is not None
        if not np.all(np.isfinite(primary)):
            raise RuntimeError("the model gives rewards that are not finite; are its weights finite?")
        prompt = len(parts[0].group.prefixes["primary"].tokens)
        responses = sum(len(tokens) for part in parts for tokens in part.group.responses)
        return Found(primary, text if proxy else None, prompt, prompt + responses)

    def _check(self, asks: Sequence[Ask]) -> None:
        """Raises ValueError where a request holds more than is allowed."""
        limits = self.limits
        counts = {
            "responses": sum(len(ask.responses) for ask in asks),
            "images": sum(len(ask.images) for ask in asks),
            "characters": sum(len(text) for ask in asks for text in (*ask.history, ask.prompt, *ask.responses)),
        }
        for name, count in counts.items():
            if count > (most := getattr(limits, name)):
                raise ValueError(f"the request has {count} {name}; at most {most} are allowed")
        for ask in asks:
            if (count := len(ask.history)) > limits.turns:
                name = ask.name or "the request"
                raise ValueError(f"{name} has {count} turns before the prompt; at most {limits.turns} are allowed")

    def _encode(self, ask: Ask, proxy: bool) -> list[Asked]:
        try:
            features = [self.pictures.of(image, name) for name, image in ask.shown.items()]
            groups = self.scorer.encode(
                features, ask.prompt, ask.responses, ask.history, proxy=proxy, alone=self.prefixes.on
            )
        except ValueError as error:
            raise ValueError(f"{ask.name}: {error}" if ask.name else str(error)) from error
        images = b"".join(hashlib.sha256(image).digest() for image in ask.images)
        return [Asked(group, images) for group in groups]

    def close(self) -> None:
        """Score what waits, and end the threads."""
        self.batcher.close()
        self.pool.shutdown()


def _with_empty(ask: Ask, found: Found, empty: float) -> Found:
    """The rewards of an ask, of which those of the responses that are not empty were found."""

    def fill(rewards: list[float]) -> list[float]:
        given = iter(rewards)
        return [next(given) if response.strip() else empty for response in ask.responses]

    proxy = None if found.proxy is None else fill(found.proxy)
    return dataclasses.replace(found, rewards=fill(found.rewards), proxy=proxy)


async def _all(futures: Iterable[asyncio.Future[T]]) -> list[T]:
    """What they give; when one fails or time is up, those that have not begun are left."""
    futures = list(futures)
    try:
        return await asyncio.gather(*futures)
    finally:
        for future in futures:
            future.cancel()


def _slices(encoded: Sequence[list[Asked]]) -> list[tuple[slice, list[Asked]]]:
    found, start = [], 0
    for parts in encoded:
        found.append((slice(start, start + len(parts)), parts))
        start += len(parts)
    return found
