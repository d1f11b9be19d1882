"""HTTP in the ingress' own process, on one machine, instead of Ray Serve's proxy in front of it.

A proxy listens on every node and reaches the replicas on all of them, at the price of one more
process that every request and answer passes. In a Ray of one machine the ingress listens itself,
which takes 12 ms off a request on two cores and 8 ms of CPU time per image (history.md, "The
ingress listens itself"; `python tests/benchmarks/serving.py latency`). Ray's own direct ingress
(RAY_SERVE_ENABLE_DIRECT_INGRESS) is as fast, but lost its port for good when an ingress was killed
twice (tests/serve/test_listener.py).
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
DRAIN_S = 10
"""Seconds that answers which have begun may take when the replica is taken down."""
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        """IPv4 or IPv6."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def url(self) -> str:
        """The address as this machine reaches it, without a trailing slash."""
        host = _LOOPBACK_OF.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def ingress_may_listen() -> bool:
    """Whether this Ray is one machine, so that the ingress can only be here and needs no proxy."""
    if behind_haproxy() or os.environ.get("RAY_ADDRESS"):
        return False
    return not ray.is_initialized() or len(ray.nodes()) == 1


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, address: Address, *, max_concurrency: int) -> AsyncIterator[None]:
    """Answer HTTP at `address` with `app` in this event loop: a FastAPI lifespan.

    Args:
        app: the application.
        address: where to listen.
        max_concurrency: requests that the application has at a time; further ones wait.

    Raises:
        OSError: another process listens there.
    """
    with socket.socket(address.family, socket.SOCK_STREAM) as listener:
        # a new replica binds where the old one has just gone, or is about to
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((address.host, address.port))
        config = uvicorn.Config(
            AdmissionMiddleware(app, max_concurrency),
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


class AdmissionMiddleware:
    """What Ray Serve's proxy does for every request, for a server without one: the request gets an
    x-request-id, waits while max_concurrency others are answered, and is cancelled when its client
    leaves.

    Uvicorn does none of this: its limit_concurrency answers 503 instead of waiting.

    Args:
        app: the application.
        max_concurrency: requests that it has at a time.
    """

    def __init__(self, app: ASGIApp, max_concurrency: int) -> None:
        self._app, self._admission = app, asyncio.Semaphore(max_concurrency)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = MutableHeaders(scope=scope).setdefault(REQUEST_ID, str(uuid.uuid4()))
        answered = False

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body")

        async with self._admission:
            incoming: asyncio.Queue[Message] = asyncio.Queue(1)
            work = asyncio.ensure_future(self._app(scope, incoming.get, send_with_id))
            left = asyncio.ensure_future(_forward_until_client_leaves(receive, incoming))
            try:
                await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
                if left.done() and not answered:
                    work.cancel()
                await asyncio.wait({work})
            finally:
                left.cancel()
                work.cancel()
        if not work.cancelled():
            work.result()  # raises what the application raised


async def _forward_until_client_leaves(receive: Receive, incoming: asyncio.Queue[Message]) -> None:
    while (message := await receive())["type"] != "http.disconnect":
        await incoming.put(message)
