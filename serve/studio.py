"""From a request whose shape is right to its pictures: may it be drawn, must it be drawn, draw.

The order is that of cost: what is wrong is said first, what is known is not drawn, and what is
drawn is charged; what fails is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterator

from pipeline.contracts import MAX_SEED
from serve.access import Access
from serve.cache import Repeats, ResultCache
from serve.errors import ApiError, shown
from serve.metrics import Metrics
from serve.pictures import LATE, Card, Job, Picture, Preview, Upload
from serve.pool import GRACE_S, Pool, error_of
from serve.safety import Safety, objection
from serve.schemas import CHAMPION, Drawable
from serve.settings import ServiceConfig


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who asks, and what their headers say.

    Attributes:
        name: of their API key.
        deadline_s: they wait no longer; None: as long as the service does.
        repeat_key: their Idempotency-Key.
    """

    name: str
    deadline_s: float | None = None
    repeat_key: str | None = None


class Studio:
    """Answers requests for pictures.

    Args:
        pool: the replicas.
        access: limits by caller.
        safety: what is not drawn.
        metrics: where cached pictures are counted.
        service: deadlines and caches.
    """

    def __init__(
        self, pool: Pool, access: Access, safety: Safety, metrics: Metrics, service: ServiceConfig
    ) -> None:
        self._pool, self._access, self._safety, self._metrics = pool, access, safety, metrics
        self._deadline_s = service.deadline_s
        self._results = ResultCache(service.result_cache_bytes)
        self._repeats = Repeats(service.idempotency_ttl_s)

    async def pictures(
        self, body: Drawable, caller: Caller, upload: Upload | None = None
    ) -> list[Picture]:
        """All pictures of a request, in order of their seeds.

        Raises:
            ApiError: 400, 404 the request is wrong; 409 its Idempotency-Key is; 429 too much is
                asked for; 503 nobody draws.
        """
        card = await self._check(body, upload)

        async def work() -> list[Picture]:
            return await self._draw(body, caller, upload, card)

        if caller.repeat_key is None:
            return await work()
        content = body.model_dump_json(), upload and upload.digest
        repeated = self._repeats.once(caller.name, caller.repeat_key, content, work)
        try:
            async with asyncio.timeout(self._patience(caller) + GRACE_S):
                return await repeated
        except TimeoutError:  # it came later than the first and has less time
            raise error_of(LATE) from None

    async def stream(
        self, body: Drawable, caller: Caller, upload: Upload | None = None
    ) -> AsyncIterator[Preview | Picture]:
        """Pictures in the making, then the picture; raises as `pictures` does."""
        if caller.repeat_key is not None:
            raise ApiError(
                400,
                "a stream is not kept to be repeated; leave idempotency-key out",
                code="invalid_value",
                param="idempotency-key",
            )
        card = await self._check(body, upload)
        (job,) = self._jobs(body, caller, upload)
        with self._charged(caller, 1, card):
            async for answer in self._pool.stream(job):
                yield answer

    async def _draw(
        self, body: Drawable, caller: Caller, upload: Upload | None, card: Card
    ) -> list[Picture]:
        jobs = self._jobs(body, caller, upload)
        kept = [self._results.get(job, card.version) if body.seed is not None else None
                for job in jobs]  # fmt: skip
        missing = [job for job, picture in zip(jobs, kept, strict=True) if picture is None]
        if body.seed is not None:
            self._metrics.cached.labels("yes").inc(len(jobs) - len(missing))
            self._metrics.cached.labels("no").inc(len(missing))
        drawn: Iterator[Picture] = iter(())
        if missing:
            with self._charged(caller, len(missing), card):
                drawn = iter(await self._pool.draw(missing))
        pictures = [next(drawn) if picture is None else picture for picture in kept]
        if body.seed is not None:
            for job, picture in zip(jobs, pictures, strict=True):
                self._results.put(job, picture)
        return pictures

    @contextlib.contextmanager
    def _charged(self, caller: Caller, pictures: int, card: Card) -> Iterator[None]:
        """Pictures are drawn in here, or fail and cost nothing; whoever leaves meanwhile pays, and
        so does whose pictures were drawn and are withheld."""
        pixels = card.image_size**2
        self._access.charge(caller.name, pictures=pictures, pixels=pixels)
        try:
            yield
        except Exception as error:
            if not (isinstance(error, ApiError) and error.code == "content_policy_violation"):
                self._access.refund(caller.name, pictures=pictures, pixels=pixels)
            raise

    def _patience(self, caller: Caller) -> float:
        return min(self._deadline_s, caller.deadline_s or math.inf)

    def _jobs(self, body: Drawable, caller: Caller, upload: Upload | None) -> list[Job]:
        patience = self._patience(caller)
        first_seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
        return [
            Job(
                request,
                deadline=time.time() + patience,
                output=body.output,
                upload=upload,
                previews=body.partial_images,
            )
            for request in body.pictures(first_seed)
        ]

    async def _check(self, body: Drawable, upload: Upload | None) -> Card:
        """Refuse what this model cannot do or should not.

        Raises:
            ApiError: 404 another model, 400 another size, style or task, or an unwanted prompt.
        """
        card = await self._pool.card()
        check_name(body.model, card)
        if body.size not in ("auto", card.size):
            raise _cannot(
                "size", body.size, f"this model draws {card.size}; ask for that or 'auto'"
            )
        if body.style is not None and body.style not in card.styles:
            known = ", ".join(card.styles) or "none; leave style out"
            raise _cannot("style", body.style, f"this model's styles are {known}")
        if upload is not None and "completion" not in card.tasks:
            raise ApiError(
                400,
                f"the model {card.name!r} cannot go on from a picture; use /v1/images/generations",
                code="unsupported_task",
                param="image",
            )
        reason = await objection(self._safety, body.said)
        if reason is not None:
            raise ApiError(400, reason, code="content_policy_violation", param="prompt")
        return card


def check_name(name: str, card: Card) -> None:
    """Raises ApiError 404 unless `name` is one of the served model's two."""
    if name not in (CHAMPION, card.name):
        raise ApiError(
            404,
            f"the model {shown(name)} is not served here; use {CHAMPION!r} or {card.name!r}",
            code="model_not_found",
            param="model",
        )


def _cannot(param: str, value: str, why: str) -> ApiError:
    return ApiError(400, f"{param}={shown(value)}: {why}", code="invalid_value", param=param)
