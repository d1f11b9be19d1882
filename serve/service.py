"""From a request whose shape is right to its images: understand, look up, charge, generate.

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
from serve.errors import ApiError
from serve.messages import (
    DEADLINE_EXCEEDED,
    GeneratedImage,
    ImageJob,
    PartialImage,
    Upload,
)
from serve.metrics import Metrics
from serve.pool import GRACE_S, ReplicaPool, error_of
from serve.safety import Safety, check_prompt
from serve.schemas import ImageOptions
from serve.settings import ServiceConfig
from serve.understand import Understood, understand


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


@dataclasses.dataclass
class _Charge:
    """What was charged for: the images that the client has already are not paid back."""

    num_delivered: int = 0


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
        self._config = service
        self._results = ResultCache(service.result_cache_bytes)
        self._idempotent = IdempotencyCache(service.idempotency_ttl_s)

    async def understand(self, body: ImageOptions, upload: Upload | None = None) -> Understood:
        """What a request means to the served model.

        Raises:
            ApiError: 404 another model is asked for; 400 the model cannot do it, or the safety hook
                does not want the prompt.
        """
        understood = understand(body, upload, await self._pool.model_info(), self._config)
        reason = await check_prompt(self._safety, body.prompt_text)
        if reason is not None:
            raise ApiError(400, reason, code="content_policy_violation", param="prompt")
        return understood

    async def generate(self, asked: Understood, client: Client) -> list[GeneratedImage]:
        """All images of a request, in order of their seeds.

        Raises:
            ApiError: 400 the model refuses it; 409 its Idempotency-Key is another request's; 429 it
                is above the client's limits or too much waits; 503 no replica answers in time.
        """

        async def work() -> list[GeneratedImage]:
            return await self._generate(asked, client)

        if client.idempotency_key is None:
            return await work()
        content = asked.sent, asked.upload and asked.upload.digest
        images = self._idempotent.run_once(client.name, client.idempotency_key, content, work)
        try:
            async with asyncio.timeout(self._deadline_s(client) + GRACE_S):
                return await images
        except TimeoutError:  # this repetition has less time than the request that it repeats
            raise error_of(DEADLINE_EXCEEDED) from None

    async def stream(
        self, asked: Understood, client: Client
    ) -> AsyncIterator[PartialImage | GeneratedImage]:
        """Partial images of each image, then the image, as they come; raises as `generate` does."""
        if client.idempotency_key is not None:
            raise ApiError(
                400,
                "a stream is not kept to be repeated; leave idempotency-key out",
                code="invalid_value",
                param="idempotency-key",
            )
        with self._charged(client, asked.num_images, asked.pixels) as charge:
            async with contextlib.aclosing(self._pool.stream(self._jobs(asked, client))) as images:
                async for image in images:
                    charge.num_delivered += isinstance(image, GeneratedImage)
                    yield image

    async def _generate(self, asked: Understood, client: Client) -> list[GeneratedImage]:
        """Images out of the result cache, which knows those with a seed, and the others anew."""
        jobs = self._jobs(asked, client)
        if asked.seed is None:
            return await self._generate_all(jobs, asked, client)
        cached = [self._results.get(job, asked.model.version) for job in jobs]
        missing = [job for job, image in zip(jobs, cached, strict=True) if image is None]
        self._metrics.cached.labels("yes").inc(len(jobs) - len(missing))
        self._metrics.cached.labels("no").inc(len(missing))
        generated = iter(await self._generate_all(missing, asked, client) if missing else ())
        images = [next(generated) if image is None else image for image in cached]
        for job, image in zip(jobs, images, strict=True):
            self._results.put(job, image)
        return images

    async def _generate_all(
        self, jobs: list[ImageJob], asked: Understood, client: Client
    ) -> list[GeneratedImage]:
        with self._charged(client, len(jobs), asked.pixels):
            return await self._pool.generate(jobs)

    @contextlib.contextmanager
    def _charged(self, client: Client, num_images: int, pixels: int) -> Iterator[_Charge]:
        """Charge for images that are generated in this context; those that fail cost nothing.

        A client that leaves meanwhile pays, and so does one whose images were generated and then
        withheld by the safety hook.
        """
        self._access.charge(client.name, num_images=num_images, pixels=pixels)
        charge = _Charge()
        try:
            yield charge
        except Exception as error:
            if not (isinstance(error, ApiError) and error.code == "content_policy_violation"):
                failed = num_images - charge.num_delivered
                self._access.refund(client.name, num_images=failed, pixels=pixels)
            raise

    def _deadline_s(self, client: Client) -> float:
        return min(self._config.deadline_s, client.deadline_s or math.inf)

    def _jobs(self, asked: Understood, client: Client) -> list[ImageJob]:
        deadline = time.time() + self._deadline_s(client)
        first_seed = secrets.randbelow(MAX_SEED + 1) if asked.seed is None else asked.seed
        return [
            ImageJob(
                request,
                deadline=deadline,
                output=asked.output,
                upload=asked.upload,
                num_partial_images=asked.num_partial_images,
            )
            for request in asked.requests(first_seed)
        ]
