"""Images that need not be generated again, in the memory of the one ingress process, bounded.

ResultCache         the same image asked for again, by anyone: on two CPU cores a cached image is
                    answered in 1 ms, a generated one in 210 (medians of `tessera bench serve
                    --concurrency 1 --seed 1`, run until all that it asks for is cached).
IdempotencyCache    the same request sent again by its client, because the first answer was lost:
                    without it a retry is generated and charged twice, and its images differ if
                    it named no seed (tests/serve/test_access.py, test_cache.py).
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

from serve.errors import ApiError, quoted
from serve.messages import GeneratedImage, ImageJob

_OVERHEAD_BYTES = 1_024
MAX_KEYS = 1_024
"""Requests with an Idempotency-Key that are remembered per client."""
MAX_ANSWER_BYTES = 64_000_000
"""Bytes of their answers, of all clients together."""
MAX_KEY_CHARS = 255


class ResultCache:
    """The images used last, by everything that they depend on; at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._images: LRUCache[bytes, GeneratedImage] = LRUCache(
            max_bytes, getsizeof=lambda image: _size([image])
        )

    def get(self, job: ImageJob, version: str) -> GeneratedImage | None:
        """The image of this job by this version of the model, if it is kept."""
        found: GeneratedImage | None = self._images.get(_key(job, version))
        return found

    def put(self, job: ImageJob, image: GeneratedImage) -> None:
        """Keep an image."""
        if _size([image]) <= self._images.maxsize:
            self._images[_key(job, image.model.version)] = image


def _size(images: Sequence[GeneratedImage]) -> int:
    return sum(len(image.encoded) + _OVERHEAD_BYTES for image in images)


def _key(job: ImageJob, version: str) -> bytes:
    """sha256 of what the image depends on, which deadline and partial images are not."""
    upload = job.upload and job.upload.digest
    content = dataclasses.astuple(job.request), dataclasses.astuple(job.output), upload, version
    return hashlib.sha256(repr(content).encode()).digest()


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A request's content as a sha256, and the task that answers it."""

    content: bytes
    task: asyncio.Task[list[GeneratedImage]]


class IdempotencyCache:
    """Requests by their Idempotency-Key: one that is sent again gets the first one's answer.

    The work goes on when the client that sent it has gone, because it may send it again. Failures
    are forgotten at once, answers when they are `ttl_s` old. Before that a client's oldest answer
    goes where it has more than MAX_KEYS of them; where those of all clients are more than
    MAX_ANSWER_BYTES, the oldest of the client with the most bytes.

    Args:
        ttl_s: seconds that an answer is kept.
        clock: seconds.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._running: dict[tuple[str, str], _Entry] = {}
        self._answered: dict[str, TTLCache[str, _Entry]] = {}

    async def run_once(
        self,
        client: str,
        key: str,
        content: object,
        work: Callable[[], Coroutine[Any, Any, list[GeneratedImage]]],
    ) -> list[GeneratedImage]:
        """The result of `work`, or that of the same request before.

        Args:
            client: whose key it is; equal keys of two clients are two keys.
            key: the header Idempotency-Key.
            content: what is asked for.
            work: generates it.

        Raises:
            ApiError: 409 the key was used for other content.
        """
        digest = hashlib.sha256(repr(content).encode()).digest()
        entry = self._running.get((client, key)) or self._answers(client).get(key)
        if entry is None:
            # a context of its own: Serve cancels what belongs to a request when its client goes
            task = asyncio.get_running_loop().create_task(work(), context=contextvars.Context())
            entry = self._running[client, key] = _Entry(digest, task)
            task.add_done_callback(lambda done: self._finished(client, key))
        if entry.content != digest:
            raise ApiError(
                409,
                f"idempotency-key={quoted(key)} was sent with another request; use a fresh one",
                code="idempotency_key_reused",
                param="idempotency-key",
            )
        return await asyncio.shield(entry.task)

    def _answers(self, client: str) -> TTLCache[str, _Entry]:
        if client not in self._answered:
            self._answered[client] = TTLCache(
                MAX_ANSWER_BYTES,
                self._ttl_s,
                timer=self._clock,
                getsizeof=lambda entry: _size(entry.task.result()),
            )
        return self._answered[client]

    def _finished(self, client: str, key: str) -> None:
        """Keep the answer, if the work did not fail, within the limits."""
        entry, answers = self._running.pop((client, key)), self._answers(client)
        failed = entry.task.cancelled() or entry.task.exception() is not None
        if failed or _size(entry.task.result()) > MAX_ANSWER_BYTES:
            return
        answers[key] = entry
        if len(answers) > MAX_KEYS:
            answers.popitem()
        while sum(kept.currsize for kept in self._answered.values()) > MAX_ANSWER_BYTES:
            max(self._answered.values(), key=lambda kept: kept.currsize).popitem()
