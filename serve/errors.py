"""Every answer that is not a success, in the envelope of OpenAI's API.

    {"error": {"message": ..., "type": ..., "param": the field or null, "code": ...},
     "detail": the message again}

Code raises `ApiError`. `install_error_handlers` makes FastAPI answer its own errors in the same
envelope: a body of the wrong shape, one that cannot be parsed, an unknown URL. middleware.py does
so for what nobody foresaw. A client never sees a traceback; the server's log has it under the
request's id (the header `x-request-id`).
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

REQUEST_ID = "x-request-id"
CODE_HEADER = "x-error-code"
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b")
_QUOTED_CHARS = 64
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class ApiError(HTTPException):
    """An answer other than success.

    It is an HTTPException because these alone pass through FastAPI's reading of a body unchanged.

    Attributes:
        status_code: the HTTP status.
        detail: the message for people: value, limit and remedy.
        code: a stable word for programs; serve/README.md lists them.
        param: the request's field at fault, if one is.
        type: OpenAI's class of error.
        retry_after_s: seconds after which to try again, for errors that pass.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        type: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        headers = {CODE_HEADER: code}  # for the log, the metrics and proxies that read no bodies
        if retry_after_s is not None:
            headers["retry-after"] = str(math.ceil(retry_after_s))
        if status_code == 401:
            headers["www-authenticate"] = "Bearer"
        super().__init__(status_code, message, headers)
        self.code, self.param, self.type, self.retry_after_s = code, param, type, retry_after_s

    @property
    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        error = {
            "message": self.detail,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error, "detail": self.detail}

    def response(self) -> JSONResponse:
        """The answer itself."""
        return JSONResponse(self.envelope, self.status_code, self.headers)


def internal_error(request: Request) -> ApiError:
    """500, and nothing but the id under which the log says more."""
    request_id = request.headers.get(REQUEST_ID, "unknown")
    return ApiError(
        500,
        f"the server failed to answer; its log says why under request id {request_id}",
        code="internal_error",
        type="server_error",
    )


_quoting = reprlib.Repr()  # bounded in depth: a client's value may be nested as deep as JSON allows
_quoting.maxlevel = 4
_quoting.maxstring = _quoting.maxlong = _quoting.maxother = 1_000


def quoted(value: object) -> str:
    """`value` as an error message may quote it: short, and printable whatever it holds."""
    unprintable = isinstance(value, str) and not value.isprintable()
    text = ascii(value) if unprintable else _quoting.repr(value)
    return text if len(text) <= _QUOTED_CHARS else text[:_QUOTED_CHARS] + "..."


def last_error(status: str) -> str:
    """The exception at the end of a traceback that Serve reports, without the traceback."""
    lines = status.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if EXCEPTION.match(line)]
    return " ".join(line.strip() for line in lines[starts[-1] if starts else -1 :])


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer the errors of FastAPI and Starlette in the envelope."""

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors()[0], _known_fields(request)).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response()
        if isinstance(error.__cause__, ClientDisconnect):  # nobody is left to be answered
            raise error.__cause__
        answer = _unreadable(request, error) if error.status_code == 400 else _named(request, error)
        response = answer.response()
        response.headers.update(error.headers or {})
        return response


def _named(request: Request, error: HTTPException) -> ApiError:
    """An error of Starlette's routing: an unknown URL, a method that the URL does not have."""
    target = f"{request.method} {quoted(request.scope['path'])}"
    code = _HTTP_CODES.get(error.status_code, "http_error")
    return ApiError(error.status_code, f"{target}: {error.detail}", code=code)


def _unreadable(request: Request, error: HTTPException) -> ApiError:
    """A body that FastAPI or Starlette could not parse."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        message = f"the multipart body cannot be read: {error.detail}"
        return ApiError(400, message, code="invalid_multipart")
    # not UTF-8, nested too deeply, or a number of thousands of digits
    foreseen = isinstance(error.__cause__, (ValueError, RecursionError))
    reason = str(error.__cause__) if foreseen else error.detail
    return ApiError(400, f"the body cannot be read: {reason}", code="invalid_json")


def _known_fields(request: Request) -> Sequence[str]:
    """The fields that the body of this request's route may have."""
    body_field = getattr(request.scope["route"], "body_field", None)
    shape: Any = body_field and body_field.field_info.annotation
    return tuple(getattr(shape, "model_fields", ()))


def _invalid(error: Mapping[str, Any], known: Sequence[str]) -> ApiError:
    """The first thing wrong with a request, by field; `error` is one of Pydantic's."""
    kind, param = error["type"], _param(error)
    if param is None:
        code = "invalid_type" if kind.endswith("_type") else "invalid_json"
        return ApiError(400, f"the body cannot be read: {_body_reason(error)}", code=code)
    code = "invalid_type" if kind.endswith("_type") else _CODES.get(kind, "invalid_value")
    return ApiError(400, _field_reason(error, param, known), code=code, param=param)


def _param(error: Mapping[str, Any]) -> str | None:
    """The field at fault, as the client wrote it; None if it is the body as a whole."""
    _, *path = error["loc"]  # after "body", "header" or "path"
    if error["type"] == "string_unicode" or not path or not isinstance(path[0], str):
        return None
    return path[0][:_QUOTED_CHARS]


def _body_reason(error: Mapping[str, Any]) -> str:
    """Why a body is no JSON object."""
    if error["type"] == "json_invalid":
        return f"{error['ctx']['error']} at character {error['loc'][-1]}"
    if error["type"] == "missing":
        return "it is empty; send a JSON object"
    if error["type"] == "model_attributes_type":
        return "it is JSON, but no object; send one"
    return str(error["msg"])


def _field_reason(error: Mapping[str, Any], param: str, known: Sequence[str]) -> str:
    """One sentence: the field, what is wrong with it, what would be right."""
    if error["type"] == "missing":
        return f"{param} is missing"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"unknown parameter {quoted(param)}; {hint}"
    if isinstance(error["input"], UploadFile):
        return f"send {param} as plain text, without a file name"
    return f"{param}={quoted(error['input'])}: {error['msg'].removeprefix('Value error, ')}"
