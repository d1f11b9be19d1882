"""Multipart forms, read within limits before FastAPI fills a route's form model from them."""

from __future__ import annotations

from collections import Counter

from fastapi import Request

from serve.errors import ApiError, quoted
from serve.schemas import MAX_PROMPT_CHARS

MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 8, 40, 4 * MAX_PROMPT_CHARS


async def read_form(request: Request) -> None:
    """Parse a request's form, which `request` then keeps: FastAPI takes it from there.

    FastAPI itself would parse up to 1,000 files and 1,000 fields of 1 MiB, and take the last of
    several values (tests/serve/test_features.py): a request would be answered that the client did
    not mean.

    Raises:
        ApiError: 400 a field was sent twice, or the form is damaged.
        HTTPException: 400 the form exceeds a limit.
    """
    try:
        form = await request.form(
            max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
        )
    except ValueError as error:  # the parser's, or a charset's that is no text encoding
        message = f"the multipart body cannot be read: {error}"
        raise ApiError(400, message, code="invalid_multipart") from error
    names = [name.removesuffix("[]") for name, _ in form.multi_items()]
    for name, times in Counter(names).items():
        if times > 1:
            one = "this model starts from one image" if name == "image" else "send one"
            raise ApiError(
                400,
                f"{quoted(name)} was sent {times} times; {one}",
                code="invalid_value",
                param=name[:64],
            )
