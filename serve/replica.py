"""One replica of the generator: a model in memory, drawing whatever pictures wait, together.

Every call of `draw` asks for one picture. `@serve.batch` puts pictures of different users into one
model call; a picture depends on its own request alone, so who shares a batch shows in nothing but
the time it takes. The model runs in a thread of its own, one call at a time: the event loop stays
free to take requests, answer health checks and encode PNGs meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from ray import serve
from torch import Tensor

from pipeline.config import ServeConfig
from pipeline.contracts import GenerationRequest, ImageGenerator
from pipeline.errors import RequestError
from pipeline.images import encode_png
from pipeline.provenance import describe
from serve.pictures import PROBE, Card, Picture, Refusal

logger = logging.getLogger("ray.serve")

Load = Callable[[], ImageGenerator]
"""Loads the model; called once in every replica."""


class Generator:
    """The generator deployment.

    Args:
        load: loads the model.
        name, version: of the model, for its card.
        config: batch size and wait.
    """

    def __init__(self, load: Load, name: str, version: str, config: ServeConfig) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._model = load()
        self._model.generate([PROBE])
        self._card = Card(
            name=name,
            version=version,
            image_size=self._model.image_size,
            styles=tuple(self._model.styles),
            loaded=int(time.time()),
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._idle = asyncio.Event()
        self._idle.set()
        self._draw_together = serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_s
        )(self._draw_batch)

    async def card(self) -> Card:
        return self._card

    async def draw(self, request: GenerationRequest) -> Picture | Refusal:
        """Draw one picture, together with whatever else waits."""
        # serve.batch closes a batch when its wait is over even if the model is still busy with the
        # one before, so pictures that trickle in would be drawn one by one. They wait outside.
        await self._idle.wait()
        drawn = await self._draw_together(request)
        if isinstance(drawn, RequestError):
            return Refusal(str(drawn), drawn.param)
        if isinstance(drawn, Exception):
            raise drawn
        png = await asyncio.to_thread(encode_png, drawn, self._describe(request))
        return Picture(png, request.seed, self._card)

    def _describe(self, request: GenerationRequest) -> dict[str, str]:
        return describe(request, model=self._card.name, version=self._card.version)

    async def _draw_batch(self, requests: list[GenerationRequest]) -> list[Tensor | Exception]:
        self._idle.clear()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, generate, self._model, requests)
        finally:
            self._idle.set()


def generate(
    model: ImageGenerator, requests: Sequence[GenerationRequest]
) -> list[Tensor | Exception]:
    """One uint8 (3, H, W) per request, or what prevented it.

    A batch that fails is drawn again one by one: a request's failure is not its neighbours'.
    """
    try:
        return list(model.generate(requests).cpu())
    except Exception as error:
        if len(requests) == 1:
            return [error]
        logger.exception("a batch of %d failed; drawing its pictures one by one", len(requests))
        return [generate(model, [request])[0] for request in requests]
