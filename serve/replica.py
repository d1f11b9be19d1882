"""One replica of the generator: a model in memory that generates whatever images wait, together.

Every call of `generate` asks for one image; engine.py puts images of different clients into one
model call. An image depends on its own request alone, so a client notices of its neighbours nothing
but the time they take. The event loop stays free to take requests, answer health checks, read
uploads and encode images meanwhile. versions.py follows the model's alias.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.bundles.provenance import UNFINISHED, describe
from pipeline.contracts import (
    GenerationRequest,
    ImageGenerator,
    PromptCountingGenerator,
    PromptTokens,
)
from pipeline.errors import RequestError
from serve.batch import DeadlineExceeded, QueuedRequest
from serve.content_credentials import Sign, load_signer
from serve.delivery import Placement, deliver
from serve.encode import encode
from serve.engine import Engine, model_thread
from serve.messages import (
    DEADLINE_EXCEEDED,
    GeneratedImage,
    ImageJob,
    ModelInfo,
    OutputOptions,
    PartialImage,
    Refusal,
    Size,
    Timing,
    written,
)
from serve.safety import load_safety
from serve.settings import ServiceConfig
from serve.uploads import lay_out
from serve.versions import FindVersion, FollowedModel, ModelVersion, load_newest


class GeneratorReplica:
    """The generator deployment.

    Args:
        version: the model to serve first if `find` has none.
        find: looks for a newer one; None where the name can stand for nothing else.
        service: batches, safety, and how often to look for a newer model.
    """

    def __init__(
        self, version: ModelVersion, find: FindVersion | None, service: ServiceConfig
    ) -> None:
        torch.set_num_threads(max(1, int(service.serve.num_cpus)))
        self._safety, self._sign = load_safety(service), load_signer(service.c2pa)
        thread = model_thread()
        model, info = thread.submit(load_newest, version, find).result()
        self._engine = Engine(
            model,
            max_batch_size=service.serve.max_batch_size,
            batch_wait_s=service.serve.batch_wait_s,
            thread=thread,
        )
        self._served = FollowedModel(
            model, info, find, every_s=service.watch_every_s, on_change=self._take_over
        )
        self._served.watch()
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self._lost: torch.AcceleratorError | None = None

    def _take_over(self, model: ImageGenerator) -> None:
        self._engine.model = model

    async def model_info(self) -> ModelInfo:
        """The version that is served now."""
        return self._served.info

    async def check_health(self) -> None:
        """Serve calls this now and then and replaces the replica if it raises: a process that a GPU
        has failed once can use it no more."""
        if self._lost is not None:
            raise self._lost

    async def generate(self, job: ImageJob) -> GeneratedImage | Refusal:
        """Generate one image, together with whatever else waits."""
        try:
            prepared = await self._prepare(job)
        except RequestError as error:
            return Refusal(str(error), error.param)
        return await self._finish(job, prepared, self._submit(job, prepared))

    async def stream(self, job: ImageJob) -> AsyncIterator[PartialImage | GeneratedImage | Refusal]:
        """Partial images of one image, then the image."""
        try:
            prepared = await self._prepare(job)
        except RequestError as error:
            yield Refusal(str(error), error.param)
            return
        seed, queued = prepared.request.seed, self._submit(job, prepared)
        try:
            async for index, pixels in _partial_images(queued):
                file = partial(_file, job.output, prepared.placement, metadata=UNFINISHED)
                made = await asyncio.to_thread(self._checked, pixels, file)
                if isinstance(made, Refusal):
                    yield made
                    return
                yield PartialImage(
                    index, made.encoded, seed, made.size, prepared.cut, prepared.unused
                )
            yield await self._finish(job, prepared, queued)
        finally:
            queued.done.cancel()

    def _submit(self, job: ImageJob, prepared: _Prepared) -> QueuedRequest:
        return self._engine.submit(
            prepared.request,
            deadline=job.deadline,
            num_partial_images=job.num_partial_images,
            num_following=job.num_following,
        )

    async def _prepare(self, job: ImageJob) -> _Prepared:
        """What a job takes before it is queued; one upload at a time, because a large one takes
        250 MB while it is decoded.

        Raises:
            RequestError: the upload cannot be used.
        """
        in_thread, request = asyncio.get_running_loop().run_in_executor, job.request
        cut = await in_thread(self._prompts, _cut, request, self._engine.model)
        if job.upload is None:
            return _Prepared(request, cut)
        image_size, fit = self._served.info.image_size, job.output.fit
        laid_out = await in_thread(self._uploads, lay_out, job.upload, image_size, fit)
        request = dataclasses.replace(request, canvas=laid_out.canvas)
        given = laid_out.masked and job.upload.share is not None
        return _Prepared(request, cut, laid_out.placement, ("strength",) if given else ())

    async def _finish(
        self, job: ImageJob, prepared: _Prepared, queued: QueuedRequest
    ) -> GeneratedImage | Refusal:
        """Await the outcome; encode the image with its provenance."""
        request = prepared.request
        try:
            raw = await queued.done
        except RequestError as error:
            return Refusal(str(error), error.param)
        except DeadlineExceeded:
            return DEADLINE_EXCEEDED
        except torch.AcceleratorError as error:
            self._lost = error
            raise
        info, began = self._served.info_of(raw.model), time.monotonic()
        metadata = describe(request, model=info.name, version=info.version)
        file = partial(
            _file, job.output, prepared.placement,
            metadata=metadata, composite=request.canvas is not None, sign=self._sign,
        )  # fmt: skip
        made = await asyncio.to_thread(self._checked, raw.pixels, file)
        if isinstance(made, Refusal):
            return made
        encode_s = time.monotonic() - began
        timing = Timing(raw.queue_s, raw.model_s, encode_s, batch_size=raw.batch_size)
        return GeneratedImage(
            made.encoded, request.seed, info, timing, raw.tokens, made.size,
            prepared.cut, prepared.unused,
        )  # fmt: skip

    def _checked(self, pixels: Tensor, file: Callable[[Tensor], _File]) -> _File | Refusal:
        """A finished or unfinished image as a file, or why the safety hook refuses it."""
        reason = self._safety.picture(pixels.permute(1, 2, 0).contiguous().numpy())
        if reason is not None:
            return Refusal(reason, None, "content_policy_violation")
        return file(pixels)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A job's request with its canvas; the rest is as of a GeneratedImage and a LaidOut."""

    request: GenerationRequest
    cut: Mapping[str, PromptTokens]
    placement: Placement | None = None
    unused: tuple[str, ...] = ()


def _cut(request: GenerationRequest, model: ImageGenerator) -> dict[str, PromptTokens]:
    """By field, the prompts of a request that are longer than the model reads."""
    if not isinstance(model, PromptCountingGenerator):
        return {}
    prompts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    counted = {name: model.count_prompt(prompt) for name, prompt in prompts.items() if prompt}
    return {name: tokens for name, tokens in counted.items() if tokens.used < tokens.given}


@dataclasses.dataclass(frozen=True)
class _File:
    """An image as it is delivered; `size` is None where that is as it was drawn."""

    encoded: bytes
    size: Size | None


def _file(
    output: OutputOptions,
    placement: Placement | None,
    drawn: Tensor,
    *,
    metadata: Mapping[str, str],
    composite: bool = False,
    sign: Sign | None = None,
) -> _File:
    """Bring an image to the shape and size that were asked for, and encode it; where that is not as
    the model draws, the metadata names both sizes."""
    pixels = deliver(drawn, output, placement)
    size = None if pixels.shape == drawn.shape else (pixels.shape[2], pixels.shape[1])
    if size is not None:
        own = written((drawn.shape[2], drawn.shape[1]))
        metadata = {**metadata, "drawn": own, "delivered": written(size)}
    encoded = encode(pixels, output, metadata, composite=composite)
    return _File(sign(encoded, output.format, composite) if sign else encoded, size)


async def _partial_images(queued: QueuedRequest) -> AsyncIterator[tuple[int, Tensor]]:
    """Partial images as they come, until the image is finished."""
    while True:
        coming = asyncio.ensure_future(queued.partial_images.get())
        try:
            either: set[asyncio.Future[Any]] = {coming, queued.done}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return
            yield coming.result()
        finally:
            coming.cancel()
