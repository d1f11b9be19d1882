"""What happens to every request: pages of other sites kept out, headers, log, count, and a 500 for
what nobody foresaw.

A plain ASGI middleware: it neither buffers a stream nor hides that a client has gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import CODE_HEADER, REQUEST_ID, ApiError, internal_error, shown
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

LEFT = 499
"""The status in log and metrics of a request whose client went before it was answered."""


class Edge:
    """Wraps an application.

    Args:
        app: the application.
        metrics: where requests are counted.
        service: of it the web pages that may call (pages of this very host always may), whether
            other machines may, and how the log is written.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, service: ServiceConfig) -> None:
        self._app, self._metrics = app, metrics
        self._origins = frozenset(service.cors_origins)
        self._only_here = not (service.keys or service.allow_anonymous)
        self._log_text = service.log_format == "text"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, code = time.monotonic(), LEFT, ""

        async def answer(message: Message) -> None:
            nonlocal status, code
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                code = headers.get(CODE_HEADER, "")
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refusal = self._foreign(Headers(scope=scope))
            await (refusal.response() if refusal else self._app)(scope, receive, answer)
        except ClientDisconnect:
            logger.info("the client has left")
        except Exception:
            logger.exception("a request failed")
            if status != LEFT:  # the answer has begun
                raise
            await internal_error(Request(scope)).response()(scope, receive, answer)
        finally:
            self._note(scope, status, code, time.monotonic() - began)

    def _foreign(self, headers: Headers) -> ApiError | None:
        """A page of another site, which could have a visitor's browser draw on this machine."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return None
        with contextlib.suppress(ValueError):  # what cannot be parsed is no page of this host
            page = urlsplit(origin)
            # without keys this machine alone is served: another name is one that was bent to it
            known = not self._only_here or is_loopback(page.hostname or "")
            if page.netloc == headers.get("host") and known:
                return None
        return ApiError(
            403,
            f"pages of {shown(origin)} may not call; name it in cors_origins",
            code="origin_not_allowed",
        )

    def _note(self, scope: Scope, status: int, code: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        more = dict(scope.get("state", {}).get("said", {}))
        code = more.pop("code", None) or code
        self._metrics.requests.labels(route, status, code).inc()
        if status == 200 and not code and route.startswith("/v1/images/"):
            self._metrics.stages.labels("request").observe(seconds)
        said = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "code": code,
            "seconds": round(seconds, 4),
            "request_id": Headers(scope=scope).get(REQUEST_ID, ""),
            **more,
        }
        if self._log_text:
            logger.info("answered %s", json.dumps(said))  # which escapes control characters
        else:
            logger.info("answered", extra={"http": said})
