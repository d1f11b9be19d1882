"""ASGI middleware around the whole application. From the outside in:

    RequestLogMiddleware     security headers, log, metrics, and a 500 for what nobody foresaw
    OriginGuardMiddleware    refuses browsers that were sent here by pages of other sites
    BodyMiddleware           bounds a request's body, and its time, while it is received

All are plain ASGI: none buffers a stream or hides that a client has gone, as Starlette's
BaseHTTPMiddleware does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from urllib.parse import urlsplit

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import CODE_HEADER, REQUEST_ID, ApiError, internal_error, quoted
from serve.metrics import Metrics
from serve.settings import ServiceConfig, is_loopback

logger = logging.getLogger("ray.serve")

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
CLIENT_LEFT = 499
"""The status in log and metrics of a request whose client went before it was answered."""
MAX_JSON_BYTES = 1_000_000


class RequestLogMiddleware:
    """Logs and counts every request, and answers those that fail unforeseen.

    Args:
        app: the application.
        metrics: where requests are counted.
        log_text: write log lines as text; else as a JSON object under the key `http`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, log_text: bool) -> None:
        self._app, self._metrics, self._log_text = app, metrics, log_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, code = time.monotonic(), CLIENT_LEFT, ""

        async def send_with_headers(message: Message) -> None:
            nonlocal status, code
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                code = headers.get(CODE_HEADER, "")
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            logger.info("the client has left")
        except Exception:
            logger.exception("a request failed")
            if status != CLIENT_LEFT:  # the answer has begun
                raise
            await internal_error(Request(scope)).response()(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, code, time.monotonic() - began)

    def _record(self, scope: Scope, status: int, code: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        fields = dict(scope.get("state", {}).get("log_fields", {}))
        code = fields.pop("code", None) or code
        self._metrics.requests.labels(route, status, code).inc()
        if status == 200 and not code and route.startswith("/v1/images/"):
            self._metrics.stages.labels("request").observe(seconds)
        line = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "code": code,
            "seconds": round(seconds, 4),
            "request_id": Headers(scope=scope).get(REQUEST_ID, ""),
            **fields,
        }
        if self._log_text:
            logger.info("answered %s", json.dumps(line))  # JSON escapes control characters
        else:
            logger.info("answered", extra={"http": line})


class OriginGuardMiddleware:
    """Refuses requests that a page of another site makes a visitor's browser send.

    Such a page could generate images on the visitor's own machine, where no key is asked for.

    Args:
        app: the application.
        service: of it the pages that may call (those of this very host always may), and whether
            this machine alone is served.
    """

    def __init__(self, app: ASGIApp, service: ServiceConfig) -> None:
        self._app = app
        self._origins = frozenset(service.cors_origins)
        self._loopback_only = service.loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or self._may_call(origin, Headers(scope=scope).get("host")):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            403,
            f"pages of {quoted(origin)} may not call; name it in cors_origins",
            code="origin_not_allowed",
        )
        await refusal.response()(scope, receive, send)

    def _may_call(self, origin: str, host: str | None) -> bool:
        if origin in self._origins:
            return True
        with contextlib.suppress(ValueError):  # an origin that is no URL is no page of this host
            page = urlsplit(origin)
            # where this machine alone is served, a host name that is not loopback's was made to
            # point here by another site (DNS rebinding)
            known = not self._loopback_only or is_loopback(page.hostname or "")
            return page.netloc == host and known
        return False


class BodyMiddleware:
    """Refuses a body that is too large, too slow, or multipart and cut off, while it is received.

    Starlette's RequestBodyLimitMiddleware, which is FastAPI's max_body_size, answers a declared
    length in plain text instead of the envelope; its multipart parser takes a body without its end
    and silently drops the part that was cut (tests/serve/test_mistakes.py, test_features.py).

    Args:
        app: the application.
        max_multipart_bytes: of a multipart body; others may have MAX_JSON_BYTES.
        timeout_s: seconds within which all of a body must have come.
    """

    def __init__(self, app: ASGIApp, max_multipart_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_multipart_bytes, self._timeout_s = max_multipart_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = self._checked(Headers(scope=scope), receive)
        await self._app(scope, receive, send)

    def _checked(self, headers: Headers, receive: Receive) -> Receive:
        """`receive`, which raises ApiError 413, 408 or 400 instead of passing such a body on."""
        media_type, options = parse_options_header(headers.get("content-type"))
        multipart = media_type == b"multipart/form-data"
        limit = self._max_multipart_bytes if multipart else MAX_JSON_BYTES
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared) > limit
        end = b"--" + options.get(b"boundary", b"") + b"--"
        received, tail = 0, b""
        until: float | None = asyncio.get_running_loop().time() + self._timeout_s

        async def checked() -> Message:
            nonlocal received, tail, until
            if too_large:
                raise _too_large(limit)
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                raise _too_slow(self._timeout_s, received) from error
            if message["type"] != "http.request":
                return message
            if not message.get("more_body"):
                until = None  # what comes next is the client's leaving
            chunk = message.get("body", b"")
            received, tail = received + len(chunk), (tail + chunk)[-len(end) - 64 :]
            if received > limit:
                raise _too_large(limit)
            complete = message.get("more_body") or tail.rstrip(b"\r\n").endswith(end)
            if multipart and not complete:
                raise ApiError(
                    400,
                    "the multipart body cannot be read: it ends before its last boundary",
                    code="invalid_multipart",
                )
            return message

        return checked


def _too_slow(limit_s: float, received: int) -> ApiError:
    """408, and the end of the connection: what still comes of the body is nobody's request."""
    error = ApiError(
        408,
        f"only {received:,} bytes of the body came within {limit_s:g} s; send it faster, or a "
        "smaller one",
        code="request_timeout",
    )
    error.headers = {**(error.headers or {}), "connection": "close"}
    return error


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit:,} bytes", code="request_too_large")
