"""Multipart bodies: a form's fields as strings and its files as bytes, within limits.

The parser is python-multipart through Starlette; what it lets pass and a client would rather know
(a body cut off, a field sent twice) is refused here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serve.errors import ApiError, invalid, limited_body, shown
from serve.schemas import Drawable

_MAX_FIELDS = 40
_MAX_FIELD_BYTES = 16_384
_FILES = ("image", "mask")

Form = TypeVar("Form", bound=Drawable)


@dataclass(frozen=True)
class Filled:
    """A form that was read: its fields, and its files by name."""

    fields: Any
    files: dict[str, bytes]


def form_body(shape: type[Form], *files: str) -> Callable[[Request], Awaitable[Filled]]:
    """A FastAPI dependency that reads a form of `shape` with files; the first must be sent.

    Raises:
        ApiError: 415 not multipart by its content type, 413 too long, 400 damaged or not of this
            shape.
    """

    async def read(request: Request) -> Filled:
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise ApiError(
                415,
                f"content-type is {shown(kind.decode('latin-1'))}; send multipart/form-data",
                code="unsupported_media_type",
            )
        limit = request.app.state.service.max_upload_bytes
        body = await limited_body(request, limit)
        if not body.rstrip(b"\r\n").endswith(b"--" + options[b"boundary"] + b"--"):
            raise _damaged("it ends before its last boundary")
        fields, sent = await _parse(request, body)
        for name in fields.keys() & set(files):
            raise _misplaced(name, "a file, with a file name")
        for name in sent.keys() - set(files):
            if name in shape.model_fields:
                raise _misplaced(name, "plain text, without a file name")
            fields[name] = "a file"  # the shape refuses it by name
        if files[0] not in sent:
            raise ApiError(
                400, f"{files[0]} is missing; send a file", code="missing_required_parameter",
                param=files[0],
            )  # fmt: skip
        try:
            return Filled(shape.model_validate_strings(fields, strict=False), sent)
        except ValidationError as error:
            known = (*shape.model_fields, *files)
            raise invalid(error.errors()[0], known) from error

    return read


async def _parse(request: Request, body: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise _damaged("its charset is not utf-8")
    parser = MultiPartParser(
        request.headers, stream(), max_files=8, max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )  # fmt: skip
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError, LookupError) as error:
        raise _damaged(str(error)) from error
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name in fields or name in files:
            remedy = "send one" if name in _FILES else "send it once"
            raise ApiError(
                400, f"{shown(name)} was sent more than once; {remedy}", code="invalid_value",
                param=name[:64],
            )  # fmt: skip
        if isinstance(value, UploadFile):
            files[name] = await value.read()
        else:
            fields[name] = value
    await form.close()
    return fields, files


def _misplaced(name: str, as_what: str) -> ApiError:
    return ApiError(400, f"send {name} as {as_what}", code="invalid_type", param=name)


def _damaged(why: str) -> ApiError:
    return ApiError(400, f"the multipart body cannot be read: {why}", code="invalid_multipart")


def form_schema(shape: type[BaseModel], *files: str) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that `form_body` reads."""
    schema = shape.model_json_schema()
    for field in schema["properties"].values():  # a form knows no null
        for kept in field.pop("anyOf", ()):
            field |= kept if kept != {"type": "null"} else {}
        if field.get("default", "") is None:
            del field["default"]
    for name in files:
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"] = [*schema.get("required", []), files[0]]
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}
