"""Images kept in the memory of the one ingress process, bounded: some need not be generated again,
others are fetched by their URL.

ResultCache         the same image asked for again, by anyone: on two CPU cores a cached image is
                    answered in 1 ms, a generated one in 210 (medians of `tessera bench serve
                    --concurrency 1 --seed 1`, run until all that it asks for is cached).
IdempotencyCache    the same request sent again by its client, because the first answer was lost:
                    without it a retry is generated and charged twice, and its images differ if
                    it named no seed (tests/serve/test_access.py, test_cache.py).
LinkedImages        images of answers with `response_format: url`, until the client fetches them.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import hashlib
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from cachetools import LRUCache, TTLCache

from serve.errors import ApiError, quoted
from serve.messages import GeneratedImage, ImageFormat, ImageJob

_OVERHEAD_BYTES = 1_024
MAX_KEYS = 1_024
"""Requests with an Idempotency-Key that are remembered per client."""
MAX_ANSWER_BYTES = 64_000_000
"""Bytes of their answers, of all clients together."""
MAX_KEY_CHARS = 255
LINK_TTL_S = 3_600.0
"""Seconds for which the URL of an image is good, as OpenAI's are."""

V = TypeVar("V")


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


class FairCache(Generic[V]):
    """What is kept for each client for a while, in bounded memory, so that no client's entries push
    out another's while that has fewer bytes.

    Args:
        max_bytes: of all clients together; beyond, the client with the most loses its oldest.
        ttl_s: seconds that an entry is kept.
        size: an entry's bytes.
        max_entries: per client; None: as many as there is room for.
        clock: seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        ttl_s: float,
        size: Callable[[V], int],
        *,
        max_entries: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes, self._ttl_s, self._size = max_bytes, ttl_s, size
        self._max_entries, self._clock = max_entries, clock
        self._entries: dict[str, TTLCache[str, V]] = {}

    def get(self, client: str, key: str) -> V | None:
        """An entry of this client's, if it is kept."""
        found: V | None = self._of(client).get(key)
        return found

    def put(self, client: str, key: str, entry: V) -> None:
        """Keep an entry, unless it alone is too large."""
        if self._size(entry) > self._max_bytes:
            return
        own = self._of(client)
        own[key] = entry
        if self._max_entries is not None and len(own) > self._max_entries:
            own.popitem()
        while sum(kept.currsize for kept in self._entries.values()) > self._max_bytes:
            max(self._entries.values(), key=lambda kept: kept.currsize).popitem()

    def _of(self, client: str) -> TTLCache[str, V]:
        if client not in self._entries:
            self._entries[client] = TTLCache(
                self._max_bytes, self._ttl_s, timer=self._clock, getsizeof=self._size
            )
        return self._entries[client]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A request's content as a sha256, and the task that answers it."""

    content: bytes
    task: asyncio.Task[list[GeneratedImage]]


class IdempotencyCache:
    """Requests by their Idempotency-Key: one that is sent again gets the first one's answer.

    The work goes on when the client that sent it has gone, because it may send it again. Failures
    are forgotten at once, answers when they are `ttl_s` old; at most MAX_KEYS are kept per client
    and MAX_ANSWER_BYTES of all clients', see FairCache.

    Args:
        ttl_s: seconds that an answer is kept.
        clock: seconds.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._running: dict[tuple[str, str], _Entry] = {}
        self._answered = FairCache[_Entry](
            MAX_ANSWER_BYTES,
            ttl_s,
            lambda entry: _size(entry.task.result()),
            max_entries=MAX_KEYS,
            clock=clock,
        )

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
        entry = self._running.get((client, key)) or self._answered.get(client, key)
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

    def _finished(self, client: str, key: str) -> None:
        """Keep the answer, if the work did not fail."""
        entry = self._running.pop((client, key))
        if not entry.task.cancelled() and entry.task.exception() is None:
            self._answered.put(client, key, entry)


@dataclasses.dataclass(frozen=True)
class LinkedImage:
    """An image under a URL."""

    encoded: bytes
    format: ImageFormat


class LinkedImages:
    """Images that answers link to, each under a name that nobody can guess, for LINK_TTL_S.

    Args:
        max_bytes: of all of them together, see FairCache.
        clock: seconds.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._images = FairCache[LinkedImage](
            max_bytes, LINK_TTL_S, lambda image: len(image.encoded) + _OVERHEAD_BYTES, clock=clock
        )

    def add(self, client: str, encoded: bytes, kind: ImageFormat) -> str:
        """Keep an image for a client.

        Returns:
            Its name, 256 random bits and the format's extension.
        """
        name = f"{secrets.token_urlsafe(32)}.{kind}"
        self._images.put(client, name, LinkedImage(encoded, kind))
        return name

    def get(self, client: str, name: str) -> LinkedImage | None:
        """The image of this name, if it is kept for this client."""
        return self._images.get(client, name)
