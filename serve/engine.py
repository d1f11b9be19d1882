"""One model drawing whatever waits, together: the queue and the batches of a replica, without Ray.

Pictures wait in line; as many as fit are drawn in one model call, in a thread of their own, while
the event loop goes on taking requests. Between two decoding steps the thread looks up: a picture
that nobody waits for any more, or whose time is over, leaves the batch, and previews are handed
out. A generator without steps (contracts.SteppedGenerator) is called once a batch.

    engine = Engine(model, max_batch_size=8, batch_wait_s=0.02)
    place = engine.enter(request, deadline=time.time() + 10)
    drawn = await place.done
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.contracts import GenerationRequest, ImageGenerator, SteppedGenerator, TokenCount

logger = logging.getLogger("ray.serve")

_PAUSE_S = 0.004
"""So long after the last arrival a batch is thought complete."""


class Late(Exception):  # noqa: N818 - an answer, not a failure
    """The picture cannot be drawn before its deadline."""


@dataclass(frozen=True)
class Drawn:
    """A picture, uint8 (3, H, W), what it cost, and where its time went, seconds."""

    image: Tensor
    model: ImageGenerator
    queue_s: float
    model_s: float
    batch_size: int
    tokens: TokenCount | None


@dataclass(eq=False)
class Place:
    """One picture's place in line.

    Attributes:
        done: the picture, `Late`, or what the model raised; cancel it to leave the line or batch.
        previews: (number, uint8 (3, H, W)) while it is drawn, in order.
    """

    request: GenerationRequest
    deadline: float
    num_previews: int
    done: asyncio.Future[Drawn]
    previews: asyncio.Queue[tuple[int, Tensor]] = field(default_factory=asyncio.Queue)
    entered: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> bool:
        return self.done.cancelled()

    def due(self, done: int, steps: int) -> int | None:
        """The number of the preview that belongs after `done` of `steps`, if one does."""
        for number in range(self.num_previews):
            at = round(steps * (number + 1) / (self.num_previews + 1))
            if at == done and 0 < done < steps:
                return number
        return None


class Engine:
    """Draws with `model`, which may be exchanged between two batches.

    Args:
        model: any ImageGenerator.
        max_batch_size: pictures drawn together.
        batch_wait_s: how long the first of a batch waits for others, at most.
    """

    def __init__(self, model: ImageGenerator, *, max_batch_size: int, batch_wait_s: float) -> None:
        self.model = model
        self._max_batch_size, self._batch_wait_s = max_batch_size, batch_wait_s
        self._line: deque[Place] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None
        self._batch_s = 0.0
        self._shared_until = 0.0

    def enter(self, request: GenerationRequest, *, deadline: float, num_previews: int = 0) -> Place:
        """Take a place in line; `deadline` is Unix time, seconds."""
        loop = asyncio.get_running_loop()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        place = Place(request, deadline, num_previews, loop.create_future())
        self._line.append(place)
        self._arrived.set()
        return place

    def close(self) -> None:
        """Stop drawing; whoever waits is told by a cancelled future."""
        if self._worker is not None:
            self._worker.cancel()
        for place in self._line:
            place.done.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            loop, began = asyncio.get_running_loop(), time.monotonic()
            outcomes = await loop.run_in_executor(
                self._thread, _draw, self.model, batch, began, loop
            )
            self._batch_s = 0.5 * (self._batch_s or time.monotonic() - began) + 0.5 * (
                time.monotonic() - began
            )
            for place, outcome in zip(batch, outcomes, strict=True):
                _settle(place, outcome)
            if len(batch) > 1:  # who was just answered may ask again
                self._shared_until = time.monotonic() + self._batch_wait_s

    async def _next_batch(self) -> list[Place]:
        """The next places in line that are still wanted and can be in time."""
        while not self._line:
            self._arrived.clear()
            await self._arrived.wait()
        await self._gather()
        batch: list[Place] = []
        while self._line and len(batch) < self._max_batch_size:
            place = self._line.popleft()
            if place.left:
                continue
            if time.time() + self._batch_s > place.deadline:
                _settle(place, Late())
            else:
                batch.append(place)
        return batch

    async def _gather(self) -> None:
        """Give others a moment to join the first in line: as long as they keep coming, and longer
        right after a shared batch. Who draws alone hardly waits."""
        end = time.monotonic() + self._batch_wait_s
        while len(self._line) < self._max_batch_size:
            now = time.monotonic()
            until = min(end, max(now + _PAUSE_S, self._shared_until))
            if until <= now:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), until - now)
            except TimeoutError:
                return


def _settle(place: Place, outcome: Drawn | Exception) -> None:
    if place.done.done():
        return
    if isinstance(outcome, Exception):
        place.done.set_exception(outcome)
    else:
        place.done.set_result(outcome)


def _draw(
    model: ImageGenerator, batch: Sequence[Place], began: float, loop: asyncio.AbstractEventLoop
) -> list[Drawn | Exception]:
    """One outcome a place. A batch that fails is drawn again one by one: a request's failure is
    not its neighbours'."""
    try:
        images = _images(model, batch, loop)
    except Exception as error:  # noqa: BLE001 - it is the outcome, told to whoever waits
        if len(batch) == 1:
            return [error]
        logger.warning("a batch of %d failed (%s); drawing one by one", len(batch), type(error))
        return [_draw(model, [place], began, loop)[0] for place in batch]
    took = time.monotonic() - began
    return [
        image
        if isinstance(image, Exception)
        else Drawn(
            image, model, began - place.entered, took, len(batch), _tokens(model, place.request)
        )
        for place, image in zip(batch, images, strict=True)
    ]


def _tokens(model: ImageGenerator, request: GenerationRequest) -> TokenCount | None:
    return model.count_tokens(request) if isinstance(model, SteppedGenerator) else None


def _images(
    model: ImageGenerator, batch: Sequence[Place], loop: asyncio.AbstractEventLoop
) -> list[Tensor | Exception]:
    requests = [place.request for place in batch]
    if not isinstance(model, SteppedGenerator):
        return list(model.generate(requests).cpu())
    drawing, late = model.start(requests), set[int]()
    while drawing.step():
        late |= {row for row, place in enumerate(batch) if _is_late(place, drawing.progress(row))}
        drawing.drop([row for row, place in enumerate(batch) if place.left or row in late])
        for row, place in enumerate(batch):
            number = place.due(*drawing.progress(row))
            if number is not None and not place.left and row not in late:
                shown = number, drawing.images([row])[0]
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(place.previews.put_nowait, shown)
    images = drawing.images(range(len(batch)))
    return [Late() if row in late else image for row, image in enumerate(images)]


def _is_late(place: Place, progress: tuple[int, int]) -> bool:
    done, steps = progress
    return done < steps and time.time() > place.deadline
