"""One replica of the generator: a model in memory, drawing whatever pictures wait, together.

Every call of `draw` asks for one picture; engine.py puts pictures of different users into one model
call. A picture depends on its own request alone, so who shares a batch shows in nothing but the
time it takes. The event loop stays free to take requests, answer health checks, read uploads and
encode pictures meanwhile.

Hot swap: where the model is named by an alias, the replica looks every few seconds what the alias
stands for. A newer version is loaded and draws once beside the old one, which it then replaces
between two batches; one that fails is refused, the old one goes on, and the card says so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pipeline.config import ServeConfig
from pipeline.contracts import GenerationRequest, ImageGenerator
from pipeline.errors import RequestError
from pipeline.provenance import describe
from serve.credentials import load_signer
from serve.encode import encode
from serve.engine import Engine, Late, Place, drawing_thread
from serve.pictures import LATE, PROBE, Card, Job, Output, Picture, Preview, Refusal, Timing
from serve.safety import load_safety
from serve.settings import ServiceConfig
from serve.uploads import canvas

logger = logging.getLogger("ray.serve")

Load = Callable[[], ImageGenerator]
"""Loads the model; called once in every replica."""

RETRY_S = 300.0  # until a refused version is tried again: what failed may have been the machine
LOADING_NICENESS = 10
"""More than other threads'; a version that loads beside one that draws gets a tenth of a CPU."""


@dataclass(frozen=True)
class Found:
    """What a model's name stands for at this moment."""

    name: str
    version: str
    load: Load


Find = Callable[[], Found]
"""Looks up an alias; raises if the registry does not answer or the bundle cannot be had."""


class Generator:
    """The generator deployment.

    Args:
        found: the model to begin with if `find` has none.
        find: looks for a newer one; None where the name can stand for nothing else.
        config: batch size and wait.
        service: safety, and how often to look.
    """

    def __init__(
        self, found: Found, find: Find | None, config: ServeConfig, service: ServiceConfig
    ) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._safety, self._sign = load_safety(service), load_signer(service.c2pa)
        self._find, self._every_s = find, service.watch_every_s
        thread = drawing_thread()
        model, self._card = thread.submit(_load_newest, found, find).result()
        self._cards = WeakKeyDictionary({model: self._card})
        self._engine = Engine(
            model,
            max_batch_size=config.max_batch_size,
            batch_wait_s=config.batch_wait_s,
            thread=thread,
        )
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._refused, self._again_at = "", 0.0
        self._lost: torch.AcceleratorError | None = None
        self._watch = asyncio.get_running_loop().create_task(self._keep_watch()) if find else None

    async def card(self) -> Card:
        return self._card

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces the replica if this raises: a process that a GPU
        has failed once can use it no more."""
        if self._lost is not None:
            raise self._lost

    async def draw(self, job: Job) -> Picture | Refusal:
        """Draw one picture, together with whatever else waits."""
        prepared = await self._prepare(job)
        if isinstance(prepared, Refusal):
            return prepared
        return await self._finish(job, prepared, self._enter(job, prepared))

    async def stream(self, job: Job) -> AsyncIterator[Preview | Picture | Refusal]:
        """The same, and pictures of it in the making before."""
        prepared = await self._prepare(job)
        if isinstance(prepared, Refusal):
            yield prepared
            return
        place = self._enter(job, prepared)
        try:
            async for number, image in _previews(place):
                sketch = partial(encode, output=job.output, metadata=_UNFINISHED)
                shown = await asyncio.to_thread(self._checked, image, sketch)
                if isinstance(shown, Refusal):
                    yield shown
                    return
                yield Preview(number, shown, prepared.seed)
            yield await self._finish(job, prepared, place)
        finally:
            place.done.cancel()

    def _enter(self, job: Job, request: GenerationRequest) -> Place:
        return self._engine.enter(
            request, deadline=job.deadline, num_previews=job.previews, to_follow=job.to_follow
        )

    async def _prepare(self, job: Job) -> GenerationRequest | Refusal:
        """The request with its upload laid out as a canvas; one upload at a time, because a large
        one takes 250 MB while it is decoded."""
        if job.upload is None:
            return job.request
        try:
            made = await asyncio.get_running_loop().run_in_executor(
                self._uploads, canvas, job.upload, self._card.image_size
            )
        except RequestError as error:
            return Refusal(str(error), error.param)
        return dataclasses.replace(job.request, canvas=made)

    async def _finish(
        self, job: Job, request: GenerationRequest, place: Place
    ) -> Picture | Refusal:
        try:
            drawn = await place.done
        except RequestError as error:
            return Refusal(str(error), error.param)
        except Late:
            return LATE
        except torch.AcceleratorError as error:
            self._lost = error
            raise
        card, began = self._cards[drawn.model], time.monotonic()
        said = describe(request, model=card.name, version=card.version)
        composite = request.canvas is not None
        file = partial(self._file, output=job.output, said=said, composite=composite)
        image = await asyncio.to_thread(self._checked, drawn.image, file)
        if isinstance(image, Refusal):
            return image
        timing = Timing(
            drawn.queue_s, drawn.model_s, time.monotonic() - began, batch_size=drawn.batch_size
        )
        card = dataclasses.replace(card, notice=self._card.notice)
        return Picture(image, request.seed, card, timing, drawn.tokens)

    def _checked(self, image: Tensor, file: Callable[[Tensor], bytes]) -> bytes | Refusal:
        """A picture, finished or in the making, as a file, or what the safety hook has against
        it."""
        reason = self._safety.picture(image.permute(1, 2, 0).contiguous().numpy())
        if reason is not None:
            return Refusal(reason, None, "content_policy_violation")
        return file(image)

    def _file(
        self, image: Tensor, output: Output, said: Mapping[str, str], composite: bool
    ) -> bytes:
        made = encode(image, output, said, composite=composite)
        return self._sign(made, output.format, composite)

    async def _keep_watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(self._every_s)

    async def _look(self) -> None:
        """Serve what the alias stands for now, or say in the card that it is not."""
        assert self._find is not None
        try:
            found = await asyncio.to_thread(self._find)
        except Exception:
            if self._card.notice != _SILENT:  # logged once, not at every look
                logger.exception("the registry does not answer")
            self._note(_SILENT)
            return
        if found.version == self._card.version:
            self._refused = ""
            self._note("")
            return
        if found.version != self._refused or time.monotonic() > self._again_at:
            await self._change_over(found)
        if found.version == self._refused:
            self._note(f"version {found.version} is refused; {_LOG}; make it anew, or move back")

    async def _change_over(self, found: Found) -> None:
        try:
            model, card = await _load_aside(found)
        except Exception:
            logger.exception("version %s is refused", found.version)
            self._refused, self._again_at = found.version, time.monotonic() + RETRY_S
            return
        self._cards[model] = card
        self._engine.model, self._card, self._refused = model, card, ""
        logger.info("version %s is served from now on", found.version)

    def _note(self, notice: str) -> None:
        if notice != self._card.notice:
            self._card = dataclasses.replace(self._card, notice=notice)


_UNFINISHED = {"Software": "Tessera (machine-made picture, unfinished)"}

# notices need no key to be read, and exceptions may name paths, hosts and passwords
_LOG = "the replicas' log says why"
_SILENT = f"the registry does not answer; {_LOG}"


def _load_newest(found: Found, find: Find | None) -> tuple[ImageGenerator, Card]:
    """What the alias stands for now; `found`, which it stood for when the application was built,
    if that cannot be had."""
    if find is not None:
        try:
            return _load(find())
        except Exception:
            logger.exception("the newest version cannot be had; version %s instead", found.version)
    return _load(found)


def _load(found: Found) -> tuple[ImageGenerator, Card]:
    """A model that has drawn, and its card."""
    model = found.load()
    model.generate([PROBE])
    return model, Card(
        name=found.name,
        version=found.version,
        image_size=model.image_size,
        styles=tuple(model.styles),
        loaded=int(time.time()),
        tasks=model.tasks,
    )


async def _load_aside(found: Found) -> tuple[ImageGenerator, Card]:
    """`_load` beside the model that draws, in a thread that ends: see `drawing_thread`."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="load", initializer=_give_way)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, _load, found)
    finally:
        thread.shutdown(wait=False)


def _give_way() -> None:
    """Let all other threads have the CPU first; on Linux niceness is a thread's own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + LOADING_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))


async def _previews(place: Place) -> AsyncIterator[tuple[int, Tensor]]:
    """Previews as they come, until the picture is done."""
    while True:
        coming = asyncio.ensure_future(place.previews.get())
        try:
            either: set[asyncio.Future[Any]] = {coming, place.done}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return
            yield coming.result()
        finally:
            coming.cancel()
