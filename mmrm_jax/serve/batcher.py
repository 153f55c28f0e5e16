"""One thread runs the model: what waits and has one shape goes through it together."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

from mmrm_jax.eval.scorer import Branch, Rewards
from mmrm_jax.serve.prefixes import Asked, Prefixes


class QueueFullError(Exception):
    """More would wait than is allowed, or the server stops: ask again later."""


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A group that is to be scored, since when, and where its rewards go."""

    asked: Asked
    branch: Branch
    key: Hashable
    since: float
    future: Future[Rewards]


class Batcher:
    """Scores groups in batches of one key (`Prefixes.key`), oldest first.

    A batch is run when it is full, or when its oldest group has waited `wait` seconds; while the model is busy groups
    gather by themselves. `on_batch(groups, seconds)` is told of every batch.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        *,
        wait: float = 0.003,
        on_batch: Callable[[int, float], None] = lambda groups, seconds: None,
    ):
        self.prefixes, self.wait, self.on_batch = prefixes, wait, on_batch
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Groups that wait."""
        return len(self._waiting)

    def submit(self, groups: Sequence[Asked], branches: Sequence[Branch] = ("primary",)) -> list[Future[Rewards]]:
        """The rewards of each group, later: all of the first branch, then of the next. Raises QueueFullError where the
        server stops."""
        now = time.monotonic()
        asked = [
            Waiting(each, branch, self.prefixes.key(each, branch), now, Future())
            for branch in branches
            for each in groups
        ]
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is stopping")
            self._waiting.extend(asked)
            self._changed.notify()
        return [each.future for each in asked]

    def close(self) -> None:
        """Score what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            chosen = [each for each in batch if each.future.set_running_or_notify_cancel()]
            if not chosen:
                continue
            started = time.monotonic()
            try:
                rewards = self.prefixes.rewards([each.asked for each in chosen], chosen[0].branch)
            except BaseException as error:
                for each in chosen:
                    each.future.set_exception(error)
                continue
            self.on_batch(len(chosen), time.monotonic() - started)
            for each, found in zip(chosen, rewards, strict=True):
                each.future.set_result(found)

    def _next(self) -> list[Waiting] | None:
        """The next batch, taken from what waits; None when all is done and the server stops."""
        most = self.prefixes.scorer.batch_size
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                alike = [each for each in self._waiting if each.key == oldest.key][:most]
                left = oldest.since + self.wait - time.monotonic()
                if len(alike) < most and left > 0 and not self._closing:
                    self._changed.wait(left)
                    continue
                taken = set(map(id, alike))
                self._waiting = deque(each for each in self._waiting if id(each) not in taken)
                return alike
