"""What need not be drawn twice: pictures asked for again, and requests sent again.

Both live in the memory of the one ingress process and are bounded.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

from cachetools import LRUCache, TTLCache

from serve.errors import ApiError, shown
from serve.pictures import Job, Picture

_OVERHEAD_BYTES = 1_024
MAX_KEYS = 256
"""Requests with an Idempotency-Key that are remembered."""
MAX_KEY_CHARS = 255


class ResultCache:
    """The latest pictures by everything that they depend on, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._kept: LRUCache[Hashable, Picture] = LRUCache(
            max_bytes, getsizeof=lambda picture: len(picture.image) + _OVERHEAD_BYTES
        )

    def get(self, job: Job, version: str) -> Picture | None:
        found: Picture | None = self._kept.get(_key(job, version))
        return found

    def put(self, job: Job, picture: Picture) -> None:
        if len(picture.image) + _OVERHEAD_BYTES <= self._kept.maxsize:
            self._kept[_key(job, picture.card.version)] = picture


def _key(job: Job, version: str) -> Hashable:
    """Deadline and previews change nothing of the picture."""
    return job.request, job.output, job.upload, version


class Repeats:
    """Requests by their Idempotency-Key: sent again, they get the first one's answer.

    The work goes on when the client that sent it first has gone, because it said that it would
    come back. Failures are not remembered.
    """

    def __init__(self, ttl_s: float) -> None:
        self._known: TTLCache[tuple[str, str], tuple[str, asyncio.Task[Any]]] = TTLCache(
            MAX_KEYS, ttl_s
        )

    async def once(
        self,
        caller: str,
        key: str,
        content: object,
        work: Callable[[], Coroutine[Any, Any, Any]],
    ) -> Any:
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
        asked = hashlib.sha256(repr(content).encode()).hexdigest()
        known = self._known.get((caller, key))
        if known is None:
            # a context of its own: Serve cancels what belongs to a request when its client goes
            task = asyncio.get_running_loop().create_task(work(), context=contextvars.Context())
            known = self._known[caller, key] = (asked, task)
            task.add_done_callback(lambda done: self._forget_failure((caller, key), done))
        if known[0] != asked:
            raise ApiError(
                409,
                f"idempotency-key={shown(key)} was sent with another request; use a fresh one",
                code="idempotency_key_reused",
                param="idempotency-key",
            )
        return await asyncio.shield(known[1])

    def _forget_failure(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        if (task.cancelled() or task.exception() is not None) and key in self._known:
            del self._known[key]
