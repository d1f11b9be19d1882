"""The queue of a replica, without Ray: whatever waits is generated together, in one model call.

Requests wait in a queue; as many as fit are run as a batch (batch.py) in the model thread, while
the event loop goes on taking requests.

    engine = Engine(model, max_batch_size=8, batch_wait_s=0.02)
    queued = engine.submit(request, deadline=time.time() + 10)
    image = await queued.done

Why not Ray Serve's `@serve.batch`: it knows whole calls alone, and this works between decoding
steps. What that is worth (tests/benchmarks/history.md, "Serving"; two CPU cores):

- batches at all: 2.09 [1.99, 2.42] times as many images per second as one by one
  (`python tests/benchmarks/serving.py throughput`);
- joining a batch under way instead of waiting for its end: 12.6, 12.7, 13.1 images per second after
  12.5, 11.2, 12.0;
- waiting up to `batch_wait_s` for a client that was just answered: two clients get 1.09 times the
  images of one, without it 0.90;
- one thread for all of PyTorch (`model_thread`): 26 ms are added to a lone image, not 84.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from pipeline.contracts import GenerationRequest, ImageGenerator
from serve.batch import DeadlineExceeded, QueuedRequest, RunningBatch

_SIBLING_S = 0.004
"""Seconds in which all images of one client's request have arrived, or are at other replicas."""


def model_thread() -> ThreadPoolExecutor:
    """One thread for everything that a process computes with PyTorch.

    libgomp gives every thread that computes helpers of its own, and once all of them outnumber the
    CPUs, even sleeping ones, helpers no longer wait awake for the next operation: on two CPUs an
    image then takes a third longer, for as long as the second thread lives.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")


class Engine:
    """Generates with `model`, which may be replaced between two batches.

    Args:
        model: any ImageGenerator.
        max_batch_size: images generated together.
        batch_wait_s: seconds that the first request of a batch waits for others, at most. It does
            not wait for a client that was just answered if that one can join later.
        thread: from `model_thread`; None makes one.
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
        self._queue: deque[QueuedRequest] = deque()
        self._arrived = asyncio.Event()
        self._thread = thread or model_thread()
        self._worker: asyncio.Task[None] | None = None
        self._image_s = 0.0  # seconds from an image's first step to its last, a running mean
        self._gather_until = 0.0

    def submit(
        self,
        request: GenerationRequest,
        *,
        deadline: float,
        num_partial_images: int = 0,
        num_following: int = 0,
    ) -> QueuedRequest:
        """Queue a request; see `QueuedRequest` for the arguments and the outcome."""
        loop = asyncio.get_running_loop()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        queued = QueuedRequest(
            request, deadline, num_partial_images, num_following, loop.create_future()
        )
        self._queue.append(queued)
        self._arrived.set()
        return queued

    def close(self) -> None:
        """Stop generating; the futures of queued requests are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
        for queued in self._queue:
            queued.done.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            if batch := await self._next_batch():
                closed = await self._run(batch)
                if closed and (len(batch) > 1 or self._queue):  # answered clients may ask again
                    self._gather_until = time.monotonic() + self._batch_wait_s
            del batch  # and with it the model that ran it, which may have been replaced

    async def _run(self, requests: list[QueuedRequest]) -> bool:
        """Run a batch; returns whether it was closed to later requests."""
        loop = asyncio.get_running_loop()
        batch = RunningBatch(self.model, loop, self._dequeue, self._record_duration)
        await loop.run_in_executor(self._thread, batch.run, requests)
        return batch.closed

    def _record_duration(self, image_s: float) -> None:
        self._image_s = 0.5 * (self._image_s or image_s) + 0.5 * image_s

    async def _next_batch(self) -> list[QueuedRequest]:
        """The next requests that are still wanted and can be in time."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        await self._gather()
        return self._dequeue(asyncio.get_running_loop(), self.model, 0)

    def _dequeue(
        self, loop: asyncio.AbstractEventLoop, model: ImageGenerator, slots_taken: int
    ) -> list[QueuedRequest]:
        """The next requests that fit beside `slots_taken`; none once the model was replaced.

        It is called from the loop or from the model thread, never from both at a time.
        """
        taken: list[QueuedRequest] = []
        late = 0
        while (
            self._queue and model is self.model and slots_taken + len(taken) < self._max_batch_size
        ):
            queued = self._queue.popleft()
            if queued.abandoned:
                continue
            if time.time() + self._image_s > queued.deadline:
                loop.call_soon_threadsafe(queued.settle, DeadlineExceeded())
                late += 1
            else:
                taken.append(queued)
        if late and not taken and not slots_taken:  # one slow image must not refuse all for ever
            self._image_s /= 2
        return taken

    async def _gather(self) -> None:
        """Give others a moment to join the first in the queue: the images of the same request and,
        while several clients ask, those just answered. A lone request does not wait."""
        end = time.monotonic() + self._batch_wait_s
        while len(self._queue) < self._max_batch_size:
            now = time.monotonic()
            siblings_until = now + _SIBLING_S if self._queue[-1].num_following else now
            until = min(end, max(siblings_until, self._gather_until))
            if until <= now:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), until - now)
            except TimeoutError:
                return
