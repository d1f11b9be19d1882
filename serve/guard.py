"""What is checked before a request's body is read: the API key and the content type.

router = APIRouter(route_class=GuardedRoute)
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.params import Body
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header

from serve.access import AccessControl
from serve.errors import ApiError, quoted
from serve.forms import read_form

MULTIPART = "multipart/form-data"


class GuardedRoute(APIRoute):
    """A route that needs an API key where there are keys, and bodies of its own content type.

    FastAPI solves dependencies after it has read and parsed the body, so a security dependency
    would have the ingress parse up to max_upload_bytes for anybody (tests/serve/test_access.py).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            access: AccessControl = request.app.state.access
            client = access.authenticate(request.headers.get("authorization"))
            request.state.client_name = client
            request.state.log_fields = {"caller": client}
            if self.body_field is not None:
                assert isinstance(self.body_field.field_info, Body)
                media_type = self.body_field.field_info.media_type
                _check_content_type(request.headers.get("content-type", ""), media_type)
                if media_type == MULTIPART:
                    await read_form(request)
            return await handle(request)

        return guarded


def _check_content_type(header: str, wanted: str) -> None:
    """Raises ApiError 415 unless a body of `wanted` is declared, a multipart one with boundary."""
    media_type, options = parse_options_header(header)
    complete = wanted != MULTIPART or options.get(b"boundary")
    if media_type != wanted.encode() or not complete:
        raise ApiError(
            415,
            f"content-type is {quoted(media_type.decode('latin-1'))}; send {wanted}",
            code="unsupported_media_type",
        )
