"""Every answer that is not a success, in OpenAI's envelope, and the reading of request bodies.

    {"error": {"message": ..., "type": ..., "param": the field or null, "code": ...}}

Routes raise `ApiError`; `install` turns it, FastAPI's validation errors and unknown routes into the
envelope, and edge.py anything unforeseen. A client never sees a traceback: what went wrong inside
is in the server's log under the request's id (the `x-request-id` header).
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

logger = logging.getLogger("ray.serve")

MAX_BODY_BYTES = 1_000_000
REQUEST_ID = "x-request-id"
CODE_HEADER = "x-error-code"
_SHOWN_CHARS = 64

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b")

Body = TypeVar("Body", bound=BaseModel)


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: the HTTP status.
        param: the field at fault, if one is.
        code: a stable word for programs.
        type: OpenAI's class of error.
        retry_after_s: when to try again, for errors that pass.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        type: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.type, self.retry_after_s = param, type, retry_after_s

    @property
    def envelope(self) -> dict[str, Any]:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The envelope as an answer; its code is in a header too, for the log and the metrics."""
        headers = {CODE_HEADER: self.code}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.envelope, self.status, headers)


def shown(value: object) -> str:
    """`value` as an error message may quote it: short, and printable whatever it holds."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def last_error(status: str) -> str:
    """The exception at the end of a traceback that Serve reports, without the traceback."""
    lines = status.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if EXCEPTION.match(line)]
    return " ".join(line.strip() for line in lines[starts[-1] if starts else -1 :])


def json_body(shape: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A FastAPI dependency that reads a JSON body of `shape`, within MAX_BODY_BYTES.

    Raises:
        ApiError: 415 not JSON by its content type, 413 too long, 400 not JSON or not of this shape.
    """

    async def read(request: Request) -> Body:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(
                415,
                f"content-type is {shown(media_type)}; send application/json",
                code="unsupported_media_type",
            )
        raw = await limited_body(request, MAX_BODY_BYTES)
        try:
            return shape.model_validate_json(raw)
        except ValidationError as error:
            raise invalid(error.errors()[0], tuple(shape.model_fields)) from error

    return read


def json_schema(shape: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that `json_body` reads; null is a field's default."""
    schema = shape.model_json_schema()
    for name in schema["properties"].keys() - set(schema.get("required", ())):
        _allow_null(schema["properties"][name])
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _allow_null(field: dict[str, Any]) -> None:
    if "anyOf" not in field:
        kept = {key: field.pop(key) for key in field.keys() - {"title", "description", "default"}}
        field["anyOf"] = [kept, {"type": "null"}]


async def limited_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be longer than `limit` bytes.

    Raises:
        ApiError: 413.
    """
    too_long = ApiError(413, f"the body is longer than {limit:,} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_long
    return bytes(body)


def install(app: FastAPI) -> None:
    """Make `app` answer every error that was foreseen in the envelope."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        target = f"{request.method} {shown(request.scope['path'])}"
        code = _HTTP_CODES.get(error.status_code, "http_error")
        answer = ApiError(error.status_code, f"{target}: {error.detail}", code=code).response()
        answer.headers.update(error.headers or {})
        return answer


def internal_error(request: Request) -> ApiError:
    """500: nothing but the id under which the log says more."""
    request_id = request.headers.get(REQUEST_ID, "unknown")
    return ApiError(
        500,
        f"the server failed to answer; its log says why under request id {request_id}",
        code="internal_error",
        type="server_error",
    )


def invalid(error: Mapping[str, Any], known: Sequence[str] = ()) -> ApiError:
    """The first thing wrong with a request, by field."""
    kind = error["type"]
    loc = [part for part in error["loc"] if part != "body"]
    param = loc[0][:_SHOWN_CHARS] if loc and isinstance(loc[0], str) else None
    code = "invalid_type" if kind.endswith("_type") else _CODES.get(kind, "invalid_value")
    return ApiError(400, _explain(error, param, known), code=code, param=param)


def _explain(error: Mapping[str, Any], param: str | None, known: Sequence[str]) -> str:
    """One sentence: the field, what is wrong with it, what would be right."""
    message = error["msg"].removeprefix("Value error, ")
    if param is None:
        return f"the body cannot be read: {message}"
    if error["type"] == "missing":
        return f"{param} is missing"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"unknown parameter {shown(param)}; {hint}"
    return f"{param}={shown(error['input'])}: {message}"
