"""One model drawing whatever waits, together: the queue and the batches of a replica, without Ray.

Pictures wait in line; as many as fit are drawn in one model call, in a thread of their own, while
the event loop goes on taking requests. Between two decoding steps the thread looks up: a picture
that nobody waits for any more, or whose time is over, leaves the batch, and previews are handed
out. Where the model's drawings are joinable (contracts.ContinuousBatch), whoever is done leaves at
once and the next in line takes the place, so the batch never closes; otherwise it is drawn to its
end. A generator without steps (contracts.SteppedGenerator) is called once a batch.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.contracts import (
    ContinuousBatch,
    GenerationBatch,
    GenerationRequest,
    ImageGenerator,
    SteppedGenerator,
    TokenCount,
)

logger = logging.getLogger("ray.serve")

_SIBLING_S = 0.004
"""So long after a picture's arrival those that were asked for together with it have arrived too,
or are drawn by other replicas."""


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
        to_follow: pictures asked for together with it that come after it.
        done: the picture, `Late`, or what the model raised; cancel it to leave the line or batch.
        previews: (number, uint8 (3, H, W)) while it is drawn, in order.
    """

    request: GenerationRequest
    deadline: float
    num_previews: int
    to_follow: int
    done: asyncio.Future[Drawn]
    previews: asyncio.Queue[tuple[int, Tensor]] = field(default_factory=asyncio.Queue)
    entered: float = field(default_factory=time.monotonic)
    told: bool = False  # the outcome is on its way

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


def drawing_thread() -> ThreadPoolExecutor:
    """One thread for everything a process computes with PyTorch.

    libgomp gives every thread that computes helpers of its own, and once all of them outnumber the
    CPUs, even sleeping ones, helpers no longer wait awake for the next operation: on two CPUs a
    picture then takes a third longer, for as long as the second thread lives.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")


class Engine:
    """Draws with `model`, which may be exchanged between two batches.

    Args:
        model: any ImageGenerator.
        max_batch_size: pictures drawn together.
        batch_wait_s: how long the first of a batch waits for others, at most; nobody waits for who
            was just answered where others may join a batch that is under way.
        thread: the one that draws, from `drawing_thread`; None makes it.
    """

    def __init__(
        self,
        model: ImageGenerator,
        *,
        max_batch_size: int,
        batch_wait_s: float,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.model = model
        self._max_batch_size, self._batch_wait_s = max_batch_size, batch_wait_s
        self._line: deque[Place] = deque()
        self._arrived = asyncio.Event()
        self._thread = thread or drawing_thread()
        self._worker: asyncio.Task[None] | None = None
        self._picture_s = 0.0  # from the start of a picture to its end, of the latest ones
        self._shared_until = 0.0

    def enter(
        self,
        request: GenerationRequest,
        *,
        deadline: float,
        num_previews: int = 0,
        to_follow: int = 0,
    ) -> Place:
        """Take a place in line; `deadline` is Unix time, seconds. See `Place` for the others."""
        loop = asyncio.get_running_loop()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        place = Place(request, deadline, num_previews, to_follow, loop.create_future())
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
            if batch := await self._next_batch():
                closed = await self._draw(batch)
                if closed and (len(batch) > 1 or self._line):  # who was just answered may ask again
                    self._shared_until = time.monotonic() + self._batch_wait_s
            del batch  # and with it the model that drew it, which may have been exchanged

    async def _draw(self, batch: list[Place]) -> bool:
        """Whether nobody could join."""
        loop = asyncio.get_running_loop()
        drawing = _Batch(self.model, loop, self._next_in_line, self._took)
        await loop.run_in_executor(self._thread, drawing.draw, batch)
        return drawing.closed

    def _took(self, picture_s: float) -> None:
        self._picture_s = 0.5 * (self._picture_s or picture_s) + 0.5 * picture_s

    async def _next_batch(self) -> list[Place]:
        """The next places in line that are still wanted and can be in time."""
        while not self._line:
            self._arrived.clear()
            await self._arrived.wait()
        await self._gather()
        return self._next_in_line(asyncio.get_running_loop(), self.model, 0)

    def _next_in_line(
        self, loop: asyncio.AbstractEventLoop, model: ImageGenerator, under_way: int
    ) -> list[Place]:
        """Whoever comes next and fits beside those under way; nobody once the model is exchanged.

        Called from the loop, or from the thread that draws: never from both at a time.
        """
        taken: list[Place] = []
        late = 0
        while self._line and model is self.model and under_way + len(taken) < self._max_batch_size:
            place = self._line.popleft()
            if place.left:
                continue
            if time.time() + self._picture_s > place.deadline:
                loop.call_soon_threadsafe(_settle, place, Late())
                late += 1
            else:
                taken.append(place)
        if late and not taken and not under_way:  # one slow picture must not turn all away for ever
            self._picture_s /= 2
        return taken

    async def _gather(self) -> None:
        """Give others a moment to join the first in line: those asked for together with the latest,
        and, while several draw, whoever was just answered. Who draws alone does not wait."""
        end = time.monotonic() + self._batch_wait_s
        while len(self._line) < self._max_batch_size:
            now = time.monotonic()
            siblings_until = now + _SIBLING_S if self._line[-1].to_follow else now
            until = min(end, max(siblings_until, self._shared_until))
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


class _Batch:
    """One model's pictures under way; lives in the thread that draws.

    Args:
        model: what draws.
        loop: where the outcomes are told.
        next_in_line: (loop, model, pictures under way) -> places to join them.
        took: told how many seconds pictures took that are done.
    """

    def __init__(
        self,
        model: ImageGenerator,
        loop: asyncio.AbstractEventLoop,
        next_in_line: Callable[[asyncio.AbstractEventLoop, ImageGenerator, int], list[Place]],
        took: Callable[[float], None],
    ) -> None:
        self._model, self._loop = model, loop
        self._next_in_line, self._took = next_in_line, took
        self._seats: dict[int, tuple[Place, float]] = {}  # by row: who, and since when
        self.closed = True  # nobody may join

    def draw(self, places: Sequence[Place]) -> None:
        """Tell every place its outcome. A batch that fails is drawn again one by one: a request's
        failure is not its neighbours'."""
        try:
            self._draw(places)
        except Exception as error:  # noqa: BLE001 - it is the outcome, told to whoever waits
            left = list(dict.fromkeys([*places, *(place for place, _ in self._seats.values())]))
            left = [place for place in left if not place.told]
            self._seats = {}
            if len(left) == 1 == len(places):
                self._tell(left[0], error)
                return
            logger.warning("a batch of %d failed (%s); drawing one by one", len(left), type(error))
            for place in left:
                _Batch(self._model, self._loop, _nobody, self._took).draw([place])

    def _draw(self, places: Sequence[Place]) -> None:
        requests = [place.request for place in places]
        self._seat(range(len(places)), places)
        if not isinstance(self._model, SteppedGenerator):
            images = self._model.generate(requests).cpu()
            self._finish(images, list(self._seats))
            return
        drawing = self._model.start(requests)
        self.closed = not (isinstance(drawing, ContinuousBatch) and drawing.joinable)
        while self._seats:
            if not drawing.step():
                raise RuntimeError("the drawing ended before its pictures did")
            gone = self._look_up(drawing)
            if done := [row for row in self._seats if _is_done(drawing, row)]:
                self._finish(drawing.images(done), done)
            if not self.closed:
                assert isinstance(drawing, ContinuousBatch)
                drawing.forget([*gone, *done])
                self._let_in(drawing, self._next_in_line(self._loop, self._model, len(self._seats)))

    def _seat(self, rows: Sequence[int], places: Sequence[Place]) -> None:
        now = time.monotonic()
        self._seats |= {row: (place, now) for row, place in zip(rows, places, strict=True)}

    def _let_in(self, drawing: ContinuousBatch, places: Sequence[Place]) -> None:
        """Join them all at once, or, if that fails, one by one: a failure is nobody else's."""
        try:
            if places:
                self._seat(drawing.join([place.request for place in places]), places)
        except Exception as error:  # noqa: BLE001 - it is the outcome
            if len(places) == 1:
                self._tell(places[0], error)
                return
            for place in places:
                self._let_in(drawing, [place])

    def _look_up(self, drawing: GenerationBatch) -> list[int]:
        """Who left or is late leaves the batch; previews that are due are handed out.

        Returns:
            The rows of those who left.
        """
        gone = []
        for row, (place, _) in list(self._seats.items()):
            done, steps = drawing.progress(row)
            late = done < steps and time.time() > place.deadline
            if late or place.left:
                drawing.drop([row])
                del self._seats[row]
                self._tell(place, Late())
                gone.append(row)
                continue
            number = place.due(done, steps)
            if number is not None:
                shown = number, drawing.images([row])[0]
                self._later(place.previews.put_nowait, shown)
        return gone

    def _finish(self, images: Tensor, rows: Sequence[int]) -> None:
        now, together = time.monotonic(), len(self._seats)
        self._later(self._took, now - self._seats[rows[-1]][1])  # before anyone can ask again
        for image, row in zip(images, rows, strict=True):
            place, since = self._seats.pop(row)
            tokens = _tokens(self._model, place.request)
            queue_s = since - place.entered
            self._tell(place, Drawn(image, self._model, queue_s, now - since, together, tokens))

    def _tell(self, place: Place, outcome: Drawn | Exception) -> None:
        place.told = True
        self._later(_settle, place, outcome)

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(call, *arguments)


def _nobody(*_: object) -> list[Place]:
    return []


def _is_done(drawing: GenerationBatch, row: int) -> bool:
    done, steps = drawing.progress(row)
    return done >= steps


def _tokens(model: ImageGenerator, request: GenerationRequest) -> TokenCount | None:
    return model.count_tokens(request) if isinstance(model, SteppedGenerator) else None
