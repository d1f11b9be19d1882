"""The generator replicas as the ingress sees them: calls with a deadline and clear failures.

Ray Serve's handle balances load over replicas and refuses what is too much. What it does not do,
and this file therefore does, once:

- a job whose replica dies is given to another one. Generating changes nothing anywhere, so it is
  simply done again: with one of two replicas killed under load, 204 images, none wrong, no request
  failed (`python tests/benchmarks/serving.py kill`, RESULTS.md);
- every failure between the deployments becomes an `ApiError` with status and remedy;
- readiness is a generated image, anyone's, and not a process that answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Sequence,
)
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.errors import EXCEPTION, ApiError, last_error
from serve.messages import PROBE_REQUEST, GeneratedImage, ImageJob, ModelInfo, PartialImage, Refusal

logger = logging.getLogger("ray.serve")

DEADLINE_S = 60.0
PROBE_TIMEOUT_S = 5.0
READY_FOR_S = 10.0
"""Seconds for which a generated image, anyone's, is proof of readiness."""
MODEL_INFO_FOR_S = 2.0
GRACE_S = 2.0
"""Seconds after the deadline, at which the replica answers, until the ingress stops waiting."""
ATTEMPTS = 3
"""To generate one image, when replicas die."""

_STATUS = {"deadline_exceeded": 503}

T = TypeVar("T")


class ReplicaPool:
    """The replicas behind `handle`.

    Args:
        handle: of the generator deployment, in the application that this code runs in.

    Attributes:
        known_model: the served model as last heard of.
        on_image: called with every image generated.
        num_waiting: images asked for and not yet generated.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self.known_model: ModelInfo | None = None
        self.on_image: Callable[[GeneratedImage], None] = lambda image: None
        self._heard_at = self._generated_at = float("-inf")
        self._asking: asyncio.Future[None] | None = None
        self._probe: asyncio.Task[str] | None = None
        self.num_waiting = 0

    async def model_info(self) -> ModelInfo:
        """The served model. When what is known is MODEL_INFO_FOR_S old, a replica is asked in the
        background, so that no client waits for it."""
        if self.known_model is None:
            await self._ask()
        elif time.monotonic() - self._heard_at > MODEL_INFO_FOR_S and self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
            self._asking.add_done_callback(self._asked)
        assert self.known_model is not None
        return self.known_model

    async def _ask(self) -> None:
        call = _retried(lambda: self._handle.model_info.remote())
        self._remember(await _explained(call, DEADLINE_S))

    def _asked(self, task: asyncio.Future[None]) -> None:
        self._asking, self._heard_at = None, time.monotonic()
        if not task.cancelled() and task.exception() is not None:
            logger.warning("no replica said which model it serves: %s", task.exception())

    async def generate(self, jobs: Sequence[ImageJob]) -> list[GeneratedImage]:
        """All images or none.

        Raises:
            ApiError: 400 the model refuses one, 429 too much waits already, 503 nobody answers.
        """
        with self._counted(len(jobs)):
            calls = [self._generate_one(job) for job in _numbered(jobs)]
            return await _explained(_all(calls), _left_s(jobs[0]))

    async def stream(
        self, jobs: Sequence[ImageJob]
    ) -> AsyncGenerator[PartialImage | GeneratedImage, None]:
        """Partial images of each image, then the image; those of several as they come.

        Raises:
            ApiError: as for `generate`; nothing comes after it.
        """
        with self._counted(len(jobs)):
            streams = [self._stream_one(job) for job in _numbered(jobs)]
            async with contextlib.aclosing(_merged(streams)) as images:
                async for image in images:
                    yield image

    async def _stream_one(
        self, job: ImageJob
    ) -> AsyncGenerator[PartialImage | GeneratedImage, None]:
        for attempt in range(1, ATTEMPTS + 1):
            begun = False
            try:
                async with contextlib.aclosing(self._streamed(job)) as images:
                    async for image in images:
                        begun = True
                        yield image
                return
            except ApiError as error:
                died = isinstance(error.__cause__, RayActorError)
                if begun or not died or attempt == ATTEMPTS:
                    raise
                logger.warning("a replica died before it sent anything; trying another")

    async def _streamed(self, job: ImageJob) -> AsyncGenerator[PartialImage | GeneratedImage, None]:
        answers: Any = self._streaming.stream.remote(job)
        try:
            while True:
                image = _accepted(await _explained(anext(answers), _left_s(job)))
                if isinstance(image, GeneratedImage):
                    self._generated(image)
                yield image
                if isinstance(image, GeneratedImage):
                    return
        finally:
            with contextlib.suppress(Exception):  # cancel() raises what the call has raised
                answers.cancel()

    async def check_ready(self) -> None:
        """Return if a replica has generated an image lately, or generates one now.

        Raises:
            ApiError: none did; the message says why.
        """
        if self._generated_lately():
            return
        if self._probe is None or self._probe.done():
            # a context of its own: Serve cancels what belongs to a request when its client goes
            self._probe = asyncio.get_running_loop().create_task(
                self._generate_probe(), context=contextvars.Context()
            )
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reason = await asyncio.shield(self._probe)
        except TimeoutError:
            reason = f"the readiness picture is not there after {PROBE_TIMEOUT_S:g} s"
        if self._generated_lately():  # the probe, or anybody's
            return
        status = await asyncio.to_thread(self._deployment_status)
        raise ApiError(
            503,
            f"not ready: {reason}; {status}",
            code="not_ready",
            type="server_error",
            retry_after_s=1,
        )

    def _generated_lately(self) -> bool:
        return time.monotonic() - self._generated_at < READY_FOR_S

    async def _generate_probe(self) -> str:
        """Why the probe failed, if it did. A model may take longer over it than one call of /readyz
        waits; the next call then waits for the same one."""
        try:
            await self.generate([ImageJob(PROBE_REQUEST, deadline=time.time() + DEADLINE_S)])
        except ApiError as error:
            return error.detail
        except Exception:
            logger.exception("a replica failed to generate the readiness image")
            return "a replica fails to draw; its log says why"
        return ""

    async def _generate_one(self, job: ImageJob) -> GeneratedImage:
        image: GeneratedImage = _accepted(await _retried(lambda: self._handle.generate.remote(job)))
        self._generated(image)
        return image

    def _generated(self, image: GeneratedImage) -> None:
        self._generated_at = time.monotonic()
        self._remember(image.model)
        self.on_image(image)

    def _remember(self, model: ModelInfo) -> None:
        self.known_model, self._heard_at = model, time.monotonic()

    @contextlib.contextmanager
    def _counted(self, num_images: int) -> Iterator[None]:
        self.num_waiting += num_images
        try:
            yield
        finally:
            self.num_waiting -= num_images

    def _deployment_status(self) -> str:
        """What Serve knows of the generator's replicas."""
        context = serve.get_replica_context()
        generator = (
            serve.status().applications[context.app_name].deployments[self._handle.deployment_name]
        )
        states = ", ".join(f"{n} {state}" for state, n in generator.replica_states.items())
        why = last_error(generator.message)
        if failed := EXCEPTION.match(why):  # /readyz needs no key, and its message may name paths
            why = f"{failed[0]}; the replicas' log says why"
        return f"replicas: {states or 'none'}; {generator.status.value} {why}".strip()


def _numbered(jobs: Sequence[ImageJob]) -> Iterator[ImageJob]:
    """Jobs that say how many follow them, so that the replica batches them together."""
    for number, job in enumerate(jobs, 1):
        yield dataclasses.replace(job, num_following=len(jobs) - number)


def _left_s(job: ImageJob) -> float:
    return max(0.0, job.deadline - time.time()) + GRACE_S


def _accepted(answer: Any) -> Any:
    """Raises ApiError if the answer is a Refusal."""
    if isinstance(answer, Refusal):
        raise error_of(answer)
    return answer


def error_of(refusal: Refusal) -> ApiError:
    """The answer that a client gets for it."""
    status = _STATUS.get(refusal.code, 400)
    return ApiError(
        status,
        refusal.message,
        code=refusal.code,
        param=refusal.param,
        type="server_error" if status == 503 else "invalid_request_error",
        retry_after_s=1 if status == 503 else None,
    )


async def _retried(call: Callable[[], Any]) -> Any:
    """Await a DeploymentResponse. If its replica died the call is made again; if the client has
    gone it is withdrawn."""
    for attempt in range(1, ATTEMPTS + 1):
        response = call()
        try:
            return await response
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # cancel() raises what the call has raised
                response.cancel()
            raise
        except RayActorError as error:
            if isinstance(error, RayTaskError) or attempt == ATTEMPTS:
                raise
            logger.warning("a replica died while it worked; trying another")
    raise AssertionError("unreachable")


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; if one fails or the client has gone, cancel the rest."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What the streams yield, as it comes; if one fails or the client has gone, all are closed."""
    coming: dict[asyncio.Future[T], AsyncGenerator[T, None]] = {}
    try:
        coming |= {asyncio.ensure_future(anext(stream)): stream for stream in streams}
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for item in done:
                stream = coming.pop(item)
                with contextlib.suppress(StopAsyncIteration):
                    found = item.result()
                    coming[asyncio.ensure_future(anext(stream))] = stream
                    yield found
    finally:
        for item in coming:
            item.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _explained(call: Awaitable[T], timeout_s: float) -> T:
    """Await with a time limit; failures between the deployments become ApiErrors."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except Exception as error:
        explained = _explanation(error, timeout_s)
        if explained is None:
            raise
        raise explained from error


def _explanation(error: Exception, timeout_s: float) -> ApiError | None:
    """The answer for a failure between the deployments; None for what was not foreseen."""
    if isinstance(error, BackPressureError):
        return ApiError(
            429,
            "too many pictures wait already; try again later",
            code="overloaded",
            type="rate_limit_error",
            retry_after_s=error.retry_after_s or 1,
        )
    if isinstance(error, TimeoutError):
        return _unavailable(f"no replica answered within {timeout_s:g} s")
    if isinstance(error, DeploymentUnavailableError):
        return _unavailable("the generator is not deployed")
    if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
        return _unavailable("the replica that drew this picture died")
    return None


def _unavailable(message: str) -> ApiError:
    return ApiError(
        503, f"{message}; try again", code="unavailable", type="server_error", retry_after_s=1
    )
