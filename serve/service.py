"""From a request whose shape is right to its images: check, look up, charge, generate.

The order is that of cost: a wrong request is refused first, a cached image is not generated, a
generated one is charged, and one that fails costs nothing.
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
from serve.access import AccessControl
from serve.cache import IdempotencyCache, ResultCache
from serve.errors import ApiError, quoted
from serve.messages import (
    DEADLINE_EXCEEDED,
    GeneratedImage,
    ImageJob,
    ModelInfo,
    PartialImage,
    Upload,
)
from serve.metrics import Metrics
from serve.pool import GRACE_S, ReplicaPool, error_of
from serve.safety import Safety, check_prompt
from serve.schemas import CHAMPION, ImageOptions
from serve.settings import ServiceConfig


@dataclasses.dataclass(frozen=True)
class Client:
    """Who asks, and what the request's headers say.

    Attributes:
        name: the name of the API key.
        deadline_s: seconds that the client waits; None: as long as the service takes at most.
        idempotency_key: the request is sent again under this key if its answer is lost.
    """

    name: str
    deadline_s: float | None = None
    idempotency_key: str | None = None


class ImageService:
    """Answers requests for images.

    Args:
        pool: the generator replicas.
        access: limits per client.
        safety: what is not generated.
        metrics: where cached images are counted.
        service: deadlines and caches.
    """

    def __init__(
        self,
        pool: ReplicaPool,
        access: AccessControl,
        safety: Safety,
        metrics: Metrics,
        service: ServiceConfig,
    ) -> None:
        self._pool, self._access, self._safety, self._metrics = pool, access, safety, metrics
        self._max_deadline_s = service.deadline_s
        self._results = ResultCache(service.result_cache_bytes)
        self._idempotent = IdempotencyCache(service.idempotency_ttl_s)

    async def generate(
        self, body: ImageOptions, client: Client, upload: Upload | None = None
    ) -> list[GeneratedImage]:
        """All images of a request, in order of their seeds.

        Raises:
            ApiError: 400, 404 the request is wrong; 409 its Idempotency-Key is; 429 it is above
                the client's limits or too much waits; 503 no replica answers in time.
        """
        model = await self._check(body, upload)

        async def work() -> list[GeneratedImage]:
            return await self._generate(body, client, upload, model)

        if client.idempotency_key is None:
            return await work()
        content = body.model_dump_json(), upload and upload.digest
        images = self._idempotent.run_once(client.name, client.idempotency_key, content, work)
        try:
            async with asyncio.timeout(self._deadline_s(client) + GRACE_S):
                return await images
        except TimeoutError:  # this repetition has less time than the request that it repeats
            raise error_of(DEADLINE_EXCEEDED) from None

    async def stream(
        self, body: ImageOptions, client: Client, upload: Upload | None = None
    ) -> AsyncIterator[PartialImage | GeneratedImage]:
        """Partial images of the one image, then the image; raises as `generate` does."""
        if client.idempotency_key is not None:
            raise ApiError(
                400,
                "a stream is not kept to be repeated; leave idempotency-key out",
                code="invalid_value",
                param="idempotency-key",
            )
        model = await self._check(body, upload)
        (job,) = self._jobs(body, client, upload)
        with self._charged(client, 1, model):
            async for image in self._pool.stream(job):
                yield image

    async def _generate(
        self, body: ImageOptions, client: Client, upload: Upload | None, model: ModelInfo
    ) -> list[GeneratedImage]:
        """Images out of the result cache, which knows those with a seed, and the others anew."""
        jobs = self._jobs(body, client, upload)
        if body.seed is None:
            return await self._generate_all(jobs, client, model)
        cached = [self._results.get(job, model.version) for job in jobs]
        missing = [job for job, image in zip(jobs, cached, strict=True) if image is None]
        self._metrics.cached.labels("yes").inc(len(jobs) - len(missing))
        self._metrics.cached.labels("no").inc(len(missing))
        generated = iter(await self._generate_all(missing, client, model) if missing else ())
        images = [next(generated) if image is None else image for image in cached]
        for job, image in zip(jobs, images, strict=True):
            self._results.put(job, image)
        return images

    async def _generate_all(
        self, jobs: list[ImageJob], client: Client, model: ModelInfo
    ) -> list[GeneratedImage]:
        with self._charged(client, len(jobs), model):
            return await self._pool.generate(jobs)

    @contextlib.contextmanager
    def _charged(self, client: Client, num_images: int, model: ModelInfo) -> Iterator[None]:
        """Charge for images that are generated in this context; those that fail cost nothing.

        A client that leaves meanwhile pays, and so does one whose images were generated and then
        withheld by the safety hook.
        """
        pixels = model.image_size**2
        self._access.charge(client.name, num_images=num_images, pixels=pixels)
        try:
            yield
        except Exception as error:
            if not (isinstance(error, ApiError) and error.code == "content_policy_violation"):
                self._access.refund(client.name, num_images=num_images, pixels=pixels)
            raise

    def _deadline_s(self, client: Client) -> float:
        return min(self._max_deadline_s, client.deadline_s or math.inf)

    def _jobs(self, body: ImageOptions, client: Client, upload: Upload | None) -> list[ImageJob]:
        deadline = time.time() + self._deadline_s(client)
        first_seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
        return [
            ImageJob(
                request,
                deadline=deadline,
                output=body.output,
                upload=upload,
                num_partial_images=body.partial_images,
            )
            for request in body.generation_requests(first_seed)
        ]

    async def _check(self, body: ImageOptions, upload: Upload | None) -> ModelInfo:
        """Refuse what the served model cannot generate or the safety hook does not want.

        Raises:
            ApiError: 404 another model; 400 another size, style or task, or an unwanted prompt.
        """
        model = await self._pool.model_info()
        check_model(body.model, model)
        if body.size not in ("auto", model.size):
            raise _unsupported(
                "size", body.size, f"this model draws {model.size}; ask for that or 'auto'"
            )
        if body.style is not None and body.style not in model.styles:
            known = ", ".join(model.styles) or "none; leave style out"
            raise _unsupported("style", body.style, f"this model's styles are {known}")
        if upload is not None and "completion" not in model.tasks:
            raise ApiError(
                400,
                f"the model {model.name!r} cannot go on from a picture; use /v1/images/generations",
                code="unsupported_task",
                param="image",
            )
        reason = await check_prompt(self._safety, body.prompt_text)
        if reason is not None:
            raise ApiError(400, reason, code="content_policy_violation", param="prompt")
        return model


def check_model(name: str, model: ModelInfo) -> None:
    """Raises ApiError 404 unless `name` is one of the served model's two names."""
    if name not in (CHAMPION, model.name):
        raise ApiError(
            404,
            f"the model {quoted(name)} is not served here; use {CHAMPION!r} or {model.name!r}",
            code="model_not_found",
            param="model",
        )


def _unsupported(param: str, value: str, why: str) -> ApiError:
    return ApiError(400, f"{param}={quoted(value)}: {why}", code="invalid_value", param=param)
