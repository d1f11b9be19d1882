"""The ingress replica's own door: HTTP on one machine without Ray Serve's proxy.

A proxy can be on every node and reaches replicas on all of them; every request passes one more
process for it, there and back. In a Ray of one machine the ingress replica listens itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import ray
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import REQUEST_ID
from serve.settings import behind_haproxy

KEEP_ALIVE_S = 90
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
DRAIN_S = 10
"""How long answers that have begun may take when the replica is taken down."""


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def url(self) -> str:
        """As this machine reaches it, without a trailing slash."""
        host = _ANY_ADDRESS.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def on_one_machine() -> bool:
    """Whether the ingress replica can only be here, and nothing else is to stand before it."""
    if behind_haproxy() or os.environ.get("RAY_ADDRESS"):
        return False
    return not ray.is_initialized() or len(ray.nodes()) == 1  # type: ignore[no-untyped-call]


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, address: Address, *, at_once: int) -> AsyncIterator[None]:
    """Answer HTTP at `address` in this event loop, at most `at_once` requests at a time.

    Raises:
        OSError: something else listens there.
    """
    with socket.socket(address.family, socket.SOCK_STREAM) as listener:
        # a replica comes where another has just gone, or is about to
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((address.host, address.port))
        config = uvicorn.Config(
            Door(app, at_once),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


class Door:
    """What a proxy of Ray Serve does for every request, in the process that answers it: the request
    gets an x-request-id, only so many come in at a time, and who leaves is worked for no longer.

    Args:
        app: what answers.
        at_once: how many requests it has at a time; others wait.
    """

    def __init__(self, app: ASGIApp, at_once: int) -> None:
        self._app, self._room = app, asyncio.Semaphore(at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = MutableHeaders(scope=scope).setdefault(REQUEST_ID, str(uuid.uuid4()))
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body")

        async with self._room:
            incoming: asyncio.Queue[Message] = asyncio.Queue(1)
            work = asyncio.ensure_future(self._app(scope, incoming.get, answer))
            left = asyncio.ensure_future(_pass_on(receive, incoming))
            try:
                await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
                if left.done() and not answered:
                    work.cancel()
                await asyncio.wait({work})
            finally:
                left.cancel()
                work.cancel()
        if not work.cancelled():
            work.result()  # raises what the application did


async def _pass_on(receive: Receive, incoming: asyncio.Queue[Message]) -> None:
    """Until the client has left."""
    while (message := await receive())["type"] != "http.disconnect":
        await incoming.put(message)
