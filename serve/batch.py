"""One call of the model: a batch whose rows join, leave and are shown between decoding steps.

It runs in the replica's model thread; engine.py holds the queue and starts it. Between two decoding
steps a request that its client abandoned or whose deadline has passed leaves the batch, and partial
images are handed out. Where the model's batches are joinable (contracts.ContinuousBatch), a
finished image leaves at once and the next in the queue takes its slot, so the batch never closes.
A generator without steps (no contracts.SteppedGenerator) is called once per batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
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


class DeadlineExceeded(Exception):  # noqa: N818 - an outcome, not a failure
    """The image cannot be generated before its deadline."""


@dataclass(frozen=True)
class RawImage:
    """A generated image, uint8 (3, H, W), the model, tokens, and where its time went, seconds.

    `batch_size` is the number of slots taken when it was finished.
    """

    pixels: Tensor
    model: ImageGenerator
    queue_s: float
    model_s: float
    batch_size: int
    tokens: TokenCount | None


@dataclass(eq=False)
class QueuedRequest:
    """A request in the queue or in a batch, and the means to hear of its outcome.

    Attributes:
        request: what to generate.
        deadline: Unix time, seconds.
        num_partial_images: to hand out before the finished image.
        num_following: requests of the same client that are submitted right after this one.
        done: a RawImage, DeadlineExceeded, or what the model raised. Cancel it to leave the queue
            or the batch.
        partial_images: (index, uint8 (3, H, W)) between steps, in order.
        queued_at: monotonic seconds.
        settled: the outcome is on its way to the event loop.
    """

    request: GenerationRequest
    deadline: float
    num_partial_images: int
    num_following: int
    done: asyncio.Future[RawImage]
    partial_images: asyncio.Queue[tuple[int, Tensor]] = field(default_factory=asyncio.Queue)
    queued_at: float = field(default_factory=time.monotonic)
    settled: bool = False

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more."""
        return self.done.cancelled()

    def settle(self, outcome: RawImage | Exception) -> None:
        """Deliver the outcome; called in the event loop."""
        if self.done.done():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)

    def partial_image_due(self, done: int, steps: int) -> int | None:
        """The index of the partial image that belongs after `done` of `steps`, if one does."""
        for index in range(self.num_partial_images):
            at = round(steps * (index + 1) / (self.num_partial_images + 1))
            if at == done and 0 < done < steps:
                return index
        return None


TakeNext = Callable[[asyncio.AbstractEventLoop, ImageGenerator, int], list[QueuedRequest]]
"""(loop, model, slots taken) -> the queued requests that may join."""


class RunningBatch:
    """The requests that one model works on; all of it runs in the model thread.

    Args:
        model: generates.
        loop: the event loop in which outcomes are delivered.
        take_next: gives requests to join.
        on_finished: called in the loop with the seconds that finished images took.

    Attributes:
        closed: no request may join.
    """

    def __init__(
        self,
        model: ImageGenerator,
        loop: asyncio.AbstractEventLoop,
        take_next: TakeNext,
        on_finished: Callable[[float], None],
    ) -> None:
        self._model, self._loop = model, loop
        self._take_next, self._on_finished = take_next, on_finished
        self._slots: dict[int, tuple[QueuedRequest, float]] = {}  # by row: request, taken at
        self.closed = True

    def run(self, requests: Sequence[QueuedRequest]) -> None:
        """Generate until no request is left, and deliver every outcome.

        A batch that fails is run again one by one: a request's failure is not its neighbours'.
        """
        try:
            self._run(requests)
        except Exception as error:  # noqa: BLE001 - it is the outcome
            known = dict.fromkeys([*requests, *(queued for queued, _ in self._slots.values())])
            left = [queued for queued in known if not queued.settled]
            self._slots = {}
            if len(left) == 1 == len(requests):
                self._deliver(left[0], error)
                return
            logger.warning("a batch of %d failed (%s); one by one now", len(left), type(error))
            for queued in left:
                RunningBatch(self._model, self._loop, _nobody, self._on_finished).run([queued])

    def _run(self, queued: Sequence[QueuedRequest]) -> None:
        requests = [each.request for each in queued]
        self._take_slots(range(len(queued)), queued)
        if not isinstance(self._model, SteppedGenerator):
            self._finish(self._model.generate(requests).cpu(), list(self._slots))
            return
        batch = self._model.start(requests)
        self.closed = not (isinstance(batch, ContinuousBatch) and batch.joinable)
        while self._slots:
            if not batch.step():
                raise RuntimeError("the batch ended before its images did")
            gone = self._drop_and_show(batch)
            if done := [row for row in self._slots if _is_done(batch, row)]:
                self._finish(batch.images(done), done)
            if not self.closed:
                assert isinstance(batch, ContinuousBatch)
                batch.forget([*gone, *done])
                self._admit(batch, self._take_next(self._loop, self._model, len(self._slots)))

    def _take_slots(self, rows: Sequence[int], queued: Sequence[QueuedRequest]) -> None:
        now = time.monotonic()
        self._slots |= {row: (each, now) for row, each in zip(rows, queued, strict=True)}

    def _admit(self, batch: ContinuousBatch, queued: Sequence[QueuedRequest]) -> None:
        """Join all at once or, if that fails, one by one: a failure is nobody else's."""
        try:
            if queued:
                self._take_slots(batch.join([each.request for each in queued]), queued)
        except Exception as error:  # noqa: BLE001 - it is the outcome
            if len(queued) == 1:
                self._deliver(queued[0], error)
                return
            for each in queued:
                self._admit(batch, [each])

    def _drop_and_show(self, batch: GenerationBatch) -> list[int]:
        """Drop rows that are abandoned or late, and hand out the partial images that are due.

        Returns:
            The rows dropped.
        """
        gone = []
        for row, (queued, _) in list(self._slots.items()):
            done, steps = batch.progress(row)
            late = done < steps and time.time() > queued.deadline
            if late or queued.abandoned:
                batch.drop([row])
                del self._slots[row]
                self._deliver(queued, DeadlineExceeded())
                gone.append(row)
                continue
            index = queued.partial_image_due(done, steps)
            if index is not None:
                partial = index, batch.images([row])[0]
                self._in_loop(queued.partial_images.put_nowait, partial)
        return gone

    def _finish(self, images: Tensor, rows: Sequence[int]) -> None:
        now, together = time.monotonic(), len(self._slots)
        # before the outcomes, so that a client that asks again at once meets the new estimate
        self._in_loop(self._on_finished, now - self._slots[rows[-1]][1])
        for image, row in zip(images, rows, strict=True):
            queued, since = self._slots.pop(row)
            tokens = _tokens(self._model, queued.request)
            queue_s = since - queued.queued_at
            self._deliver(
                queued, RawImage(image, self._model, queue_s, now - since, together, tokens)
            )

    def _deliver(self, queued: QueuedRequest, outcome: RawImage | Exception) -> None:
        queued.settled = True
        self._in_loop(queued.settle, outcome)

    def _in_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(call, *arguments)


def _nobody(*_: object) -> list[QueuedRequest]:
    return []


def _is_done(batch: GenerationBatch, row: int) -> bool:
    done, steps = batch.progress(row)
    return done >= steps


def _tokens(model: ImageGenerator, request: GenerationRequest) -> TokenCount | None:
    return model.count_tokens(request) if isinstance(model, SteppedGenerator) else None
