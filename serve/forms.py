"""What a multipart form may hold, beyond what FastAPI's form parameters check.

@router.post(..., form_limits=FORM_LIMITS, dependencies=[Depends(check_form)])
"""

from __future__ import annotations

from collections import Counter

from fastapi import Request

from serve.errors import ApiError, quoted

FORM_LIMITS = {"max_files": 8, "max_fields": 40, "max_part_size": 16_384}
"""Starlette's limits on the number of parts and, in bytes, on the size of a text field."""


async def check_form(request: Request) -> None:
    """Refuse a field that was sent twice or is empty.

    FastAPI would take the last of several values, and an empty one for a field that was left out
    (tests/serve/test_features.py): a request would be answered that the client did not mean.

    Raises:
        ApiError: 400.
    """
    fields = [
        (name.removesuffix("[]"), value) for name, value in (await request.form()).multi_items()
    ]
    for name, times in Counter(name for name, _ in fields).items():
        if times > 1:
            raise _wrong(name, "was sent more than once; send one")
    for name, value in fields:
        if value == "":
            raise _wrong(name, "is empty; give it a value or leave it out")


def _wrong(name: str, why: str) -> ApiError:
    return ApiError(400, f"{quoted(name)} {why}", code="invalid_value", param=name[:64])
