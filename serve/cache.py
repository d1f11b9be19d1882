"""What need not be drawn twice: pictures asked for again, and requests sent again.

Both live in the memory of the one ingress process and are bounded.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import hashlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from cachetools import LRUCache, TTLCache

from serve.errors import ApiError, shown
from serve.pictures import Job, Picture

_OVERHEAD_BYTES = 1_024
MAX_KEYS = 1_024
"""Requests with an Idempotency-Key that are remembered, of one caller."""
MAX_ANSWER_BYTES = 64_000_000
"""Of their answers, of all callers together."""
MAX_KEY_CHARS = 255


class ResultCache:
    """The latest pictures by everything that they depend on, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[bytes, Picture] = LRUCache(
            max_bytes, getsizeof=lambda picture: _size([picture])
        )

    def get(self, job: Job, version: str) -> Picture | None:
        found: Picture | None = self._kept.get(_key(job, version))
        return found

    def put(self, job: Job, picture: Picture) -> None:
        if _size([picture]) <= self._kept.maxsize:
            self._kept[_key(job, picture.card.version)] = picture


def _size(pictures: Sequence[Picture]) -> int:
    return sum(len(picture.image) + _OVERHEAD_BYTES for picture in pictures)


def _key(job: Job, version: str) -> bytes:
    """sha256 of what the picture depends on; deadline and previews change nothing of it."""
    upload = job.upload and job.upload.digest
    said = dataclasses.astuple(job.request), dataclasses.astuple(job.output), upload, version
    return hashlib.sha256(repr(said).encode()).digest()


@dataclasses.dataclass(frozen=True)
class _Sent:
    """What was asked for, as a sha256, and who answers it."""

    asked: bytes
    task: asyncio.Task[list[Picture]]


class Repeats:
    """Requests by their Idempotency-Key: sent again, they get the first one's answer.

    The work goes on when the client that sent it first has gone, because it said that it would
    come back. Failures are not remembered. Answers are forgotten when they are `ttl_s` old; before
    that a caller's oldest when there are more than MAX_KEYS of them, and where all callers' are
    more than MAX_ANSWER_BYTES, those of whoever holds most.

    Args:
        ttl_s: seconds from the answer on.
        clock: seconds.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._under_way: dict[tuple[str, str], _Sent] = {}
        self._answered: dict[str, TTLCache[str, _Sent]] = {}

    async def once(
        self,
        caller: str,
        key: str,
        content: object,
        work: Callable[[], Coroutine[Any, Any, list[Picture]]],
    ) -> list[Picture]:
        """`work`'s result, or that of the same request before.

        Args:
            caller: keys of different callers are different keys.
            key: the header.
            content: what is asked for.
            work: draws.

        Raises:
            ApiError: 400 the key is too long, 409 it was used for something else.
        """
        if not key or len(key) > MAX_KEY_CHARS:
            raise ApiError(
                400,
                f"idempotency-key={shown(key)} has {len(key)} characters, not 1 to {MAX_KEY_CHARS}",
                code="invalid_value",
                param="idempotency-key",
            )
        asked = hashlib.sha256(repr(content).encode()).digest()
        known = self._under_way.get((caller, key)) or self._answers(caller).get(key)
        if known is None:
            # a context of its own: Serve cancels what belongs to a request when its client goes
            task = asyncio.get_running_loop().create_task(work(), context=contextvars.Context())
            known = self._under_way[caller, key] = _Sent(asked, task)
            task.add_done_callback(lambda done: self._done(caller, key))
        if known.asked != asked:
            raise ApiError(
                409,
                f"idempotency-key={shown(key)} was sent with another request; use a fresh one",
                code="idempotency_key_reused",
                param="idempotency-key",
            )
        return await asyncio.shield(known.task)

    def _answers(self, caller: str) -> TTLCache[str, _Sent]:
        if caller not in self._answered:
            self._answered[caller] = TTLCache(
                MAX_ANSWER_BYTES,
                self._ttl_s,
                timer=self._clock,
                getsizeof=lambda sent: _size(sent.task.result()),
            )
        return self._answered[caller]

    def _done(self, caller: str, key: str) -> None:
        """Keep the answer, if it is one, within the limits."""
        sent, kept = self._under_way.pop((caller, key)), self._answers(caller)
        failed = sent.task.cancelled() or sent.task.exception() is not None
        if failed or _size(sent.task.result()) > MAX_ANSWER_BYTES:
            return
        kept[key] = sent
        if len(kept) > MAX_KEYS:
            kept.popitem()
        while sum(answers.currsize for answers in self._answered.values()) > MAX_ANSWER_BYTES:
            max(self._answered.values(), key=lambda answers: answers.currsize).popitem()
