"""The generator's replicas as the ingress sees them: calls with a time limit and clear failures.

Everything that can go wrong between the two deployments becomes an `ApiError` here, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from pipeline.contracts import GenerationRequest
from serve.errors import ApiError, last_error
from serve.pictures import PROBE, Card, Picture, Refusal

logger = logging.getLogger("ray.serve")

DRAW_TIMEOUT_S = 120.0
PROBE_TIMEOUT_S = 5.0
READY_FOR_S = 10.0
"""A drawn picture, anyone's, is proof of readiness for so long."""


class Pool:
    """The replicas behind `handle`.

    Args:
        handle: of the generator deployment, in the application this code runs in.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._card: Card | None = None
        self._last_drawn = -READY_FOR_S

    async def card(self) -> Card:
        """The served model's card; asked of a replica once, then kept up to date by pictures."""
        if self._card is None:
            (self._card,) = await self._gather([self._handle.card.remote()], DRAW_TIMEOUT_S)
        assert self._card is not None
        return self._card

    async def draw(
        self, requests: Sequence[GenerationRequest], timeout_s: float = DRAW_TIMEOUT_S
    ) -> list[Picture]:
        """Draw all pictures or none.

        Raises:
            ApiError: 400 the model refuses one, 429 too much waits already, 503 nobody answers.
        """
        calls = [self._handle.draw.remote(request) for request in requests]
        pictures = []
        for answer in await self._gather(calls, timeout_s):
            if isinstance(answer, Refusal):
                raise ApiError(400, answer.message, code="invalid_value", param=answer.param)
            pictures.append(answer)
        self._last_drawn = time.monotonic()
        self._card = pictures[0].card
        return pictures

    async def check_ready(self) -> None:
        """Return if a replica has drawn a picture lately, or draws one now.

        Raises:
            ApiError: none did; the message says why.
        """
        if time.monotonic() - self._last_drawn < READY_FOR_S:
            return
        try:
            await self.draw([PROBE], PROBE_TIMEOUT_S)
            return
        except ApiError as error:
            reason = error.message
        except Exception:
            logger.exception("a replica failed to draw the readiness picture")
            reason = "a replica fails to draw; its log says why"
        status = await asyncio.to_thread(self._deployment_status)
        raise ApiError(
            503,
            f"not ready: {reason}; {status}",
            code="not_ready",
            type="server_error",
            retry_after_s=1,
        )

    async def _gather(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """Await all DeploymentResponses; if one fails or the client has gone, withdraw the rest."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*calls)
        except BaseException as error:
            for call in calls:
                with contextlib.suppress(Exception):  # cancel() raises what the call has raised
                    call.cancel()
            known = _explained(error, timeout_s)
            if known is None:
                raise
            raise known from error

    def _deployment_status(self) -> str:
        """What Serve knows of the generator's replicas."""
        context = serve.get_replica_context()
        generator = (
            serve.status().applications[context.app_name].deployments[self._handle.deployment_name]
        )
        states = ", ".join(f"{n} {state}" for state, n in generator.replica_states.items())
        why = last_error(generator.message)
        return f"replicas: {states or 'none'}; {generator.status.value} {why}".strip()


def _explained(error: BaseException, timeout_s: float) -> ApiError | None:
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
