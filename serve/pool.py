"""The generator's replicas as the ingress sees them: calls with a deadline and clear failures.

Everything that can go wrong between the two deployments becomes an `ApiError` here, once. Drawing
changes nothing anywhere, so a picture whose replica died is simply drawn again by another.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.errors import EXCEPTION, ApiError, last_error
from serve.pictures import PROBE, Card, Job, Picture, Preview, Refusal

logger = logging.getLogger("ray.serve")

DEADLINE_S = 60.0
PROBE_TIMEOUT_S = 5.0
READY_FOR_S = 10.0
"""A drawn picture, anyone's, is proof of readiness for so long."""
CARD_FOR_S = 2.0
GRACE_S = 2.0
"""The replica answers at the deadline; the ingress stops listening so much later."""
ATTEMPTS = 3
"""Of drawing one picture, when replicas die under it."""

_STATUS = {"deadline_exceeded": 503}

T = TypeVar("T")


class Pool:
    """The replicas behind `handle`.

    Args:
        handle: of the generator deployment, in the application this code runs in.

    Attributes:
        known: the card as last heard of.
        on_picture: told of every picture drawn.
        waiting: pictures asked for and not yet drawn.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self.known: Card | None = None
        self.on_picture: Callable[[Picture], None] = lambda picture: None
        self._card_at = self._drawn_at = float("-inf")
        self._asking: asyncio.Future[None] | None = None
        self._probe: asyncio.Task[str] | None = None
        self.waiting = 0

    async def card(self) -> Card:
        """The served model's card; when it is CARD_FOR_S old a replica is asked behind the scenes,
        so that nobody waits for it."""
        if self.known is None:
            await self._ask()
        elif time.monotonic() - self._card_at > CARD_FOR_S and self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
            self._asking.add_done_callback(self._asked)
        assert self.known is not None
        return self.known

    async def _ask(self) -> None:
        call = _retried(lambda: self._handle.card.remote())
        self._remember(await _explain(call, DEADLINE_S))

    def _asked(self, task: asyncio.Future[None]) -> None:
        self._asking, self._card_at = None, time.monotonic()
        if not task.cancelled() and task.exception() is not None:
            logger.warning("no replica said what it serves: %s", task.exception())

    async def draw(self, jobs: Sequence[Job]) -> list[Picture]:
        """Draw all pictures or none.

        Raises:
            ApiError: 400 the model refuses one, 429 too much waits already, 503 nobody answers.
        """
        with self._counted(len(jobs)):
            pictures: list[Picture] = await _explain(
                _all([self._one(job) for job in _announced(jobs)]), _left_s(jobs[0])
            )
        return pictures

    async def stream(self, job: Job) -> AsyncIterator[Preview | Picture]:
        """Previews of one picture, then the picture.

        Raises:
            ApiError: as for `draw`.
        """
        with self._counted(1):
            for attempt in range(1, ATTEMPTS + 1):
                shown = False
                try:
                    async with contextlib.aclosing(self._streamed(job)) as answers:
                        async for answer in answers:
                            shown = True
                            yield answer
                    return
                except ApiError as error:
                    died = isinstance(error.__cause__, RayActorError)
                    if shown or not died or attempt == ATTEMPTS:
                        raise
                    logger.warning("a replica died before it showed anything; trying another")

    async def _streamed(self, job: Job) -> AsyncGenerator[Preview | Picture, None]:
        answers: Any = self._streaming.stream.remote(job)
        try:
            while True:
                answer = _accepted(await _explain(anext(answers), _left_s(job)))
                if isinstance(answer, Picture):
                    self._drawn(answer)
                yield answer
                if isinstance(answer, Picture):
                    return
        finally:
            with contextlib.suppress(Exception):  # cancel() raises what the call has raised
                answers.cancel()

    async def check_ready(self) -> None:
        """Return if a replica has drawn a picture lately, or draws one now.

        Raises:
            ApiError: none did; the message says why.
        """
        if self._drew_lately():
            return
        if self._probe is None or self._probe.done():
            # of nobody's request: Serve cancels what belongs to one whose client has gone
            self._probe = asyncio.get_running_loop().create_task(
                self._draw_probe(), context=contextvars.Context()
            )
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reason = await asyncio.shield(self._probe)
        except TimeoutError:
            reason = f"the readiness picture is not there after {PROBE_TIMEOUT_S:g} s"
        if self._drew_lately():  # that picture, or anybody's
            return
        status = await asyncio.to_thread(self._deployment_status)
        raise ApiError(
            503,
            f"not ready: {reason}; {status}",
            code="not_ready",
            type="server_error",
            retry_after_s=1,
        )

    def _drew_lately(self) -> bool:
        return time.monotonic() - self._drawn_at < READY_FOR_S

    async def _draw_probe(self) -> str:
        """Why the readiness picture was not drawn; a model may take longer over it than one call of
        /readyz waits."""
        try:
            await self.draw([Job(PROBE, deadline=time.time() + DEADLINE_S)])
        except ApiError as error:
            return error.message
        except Exception:
            logger.exception("a replica failed to draw the readiness picture")
            return "a replica fails to draw; its log says why"
        return ""

    async def _one(self, job: Job) -> Picture:
        picture: Picture = _accepted(await _retried(lambda: self._handle.draw.remote(job)))
        self._drawn(picture)
        return picture

    def _drawn(self, picture: Picture) -> None:
        self._drawn_at = time.monotonic()
        self._remember(picture.card)
        self.on_picture(picture)

    def _remember(self, card: Card) -> None:
        self.known, self._card_at = card, time.monotonic()

    @contextlib.contextmanager
    def _counted(self, pictures: int) -> Any:
        self.waiting += pictures
        try:
            yield
        finally:
            self.waiting -= pictures

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


def _announced(jobs: Sequence[Job]) -> Iterator[Job]:
    """Each says how many follow it, so that the replica knows whom to wait for."""
    for place, job in enumerate(jobs, 1):
        yield dataclasses.replace(job, to_follow=len(jobs) - place)


def _left_s(job: Job) -> float:
    return max(0.0, job.deadline - time.time()) + GRACE_S


def _accepted(answer: Any) -> Any:
    """Raises ApiError if the answer is a Refusal."""
    if isinstance(answer, Refusal):
        raise error_of(answer)
    return answer


def error_of(refusal: Refusal) -> ApiError:
    """What a client is told of it."""
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
    """Await a DeploymentResponse; make the call again if its replica died, withdraw it if the
    client has gone."""
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
            logger.warning("a replica died while it drew; trying another")
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


async def _explain(call: Any, timeout_s: float) -> Any:
    """Await with a time limit; failures between the deployments become ApiErrors."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except Exception as error:
        known = _explained(error, timeout_s)
        if known is None:
            raise
        raise known from error


def _explained(error: Exception, timeout_s: float) -> ApiError | None:
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
