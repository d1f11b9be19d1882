"""Pictures as clients get them: one JSON answer, or a stream of server-sent events."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import Request

from serve.errors import ApiError, internal_error
from serve.pictures import Card, Picture, Preview
from serve.schemas import (
    Drawable,
    ImageData,
    ImageEvent,
    ImagesResponse,
    InputDetails,
    Model,
    Usage,
)

logger = logging.getLogger("ray.serve")


def images_response(body: Drawable, pictures: Sequence[Picture]) -> ImagesResponse:
    """One request's pictures, at least one."""
    card = pictures[-1].card
    return ImagesResponse(
        created=int(time.time()),
        data=[_image_data(body, picture) for picture in pictures],
        size=card.size,
        output_format=body.output_format,
        usage=usage(pictures),
        model=card.name,
        model_version=card.version,
    )


def usage(pictures: Sequence[Picture]) -> Usage | None:
    """Tokens over all pictures; None if the model does not count them."""
    counts = [picture.tokens for picture in pictures if picture.tokens is not None]
    if len(counts) < len(pictures):
        return None
    text, canvas, drawn = (
        sum(getattr(count, part) for count in counts) for part in ("text", "canvas", "drawn")
    )
    return Usage(
        input_tokens=text + canvas,
        input_tokens_details=InputDetails(text_tokens=text, image_tokens=canvas),
        output_tokens=drawn,
        total_tokens=text + canvas + drawn,
    )


def model_entry(name: str, card: Card) -> Model:
    """An entry of GET /v1/models."""
    return Model(
        id=name,
        created=card.loaded,
        version=card.version,
        size=card.size,
        styles=card.styles,
        tasks=tuple(sorted(card.tasks)),
    )


async def events(
    kind: str,
    body: Drawable,
    first: Preview | Picture,
    rest: AsyncIterator[Preview | Picture],
    request: Request,
) -> AsyncIterator[str]:
    """`KIND.partial_image` for every preview, `KIND.completed` for the picture, `error` if it
    fails on the way."""
    card: Card = await request.app.state.pool.card()
    try:
        yield _event(kind, body, first, card)
        async for answer in rest:
            yield _event(kind, body, answer, card)
    except Exception as error:
        if not isinstance(error, ApiError):
            logger.exception("a stream failed")
        told = error if isinstance(error, ApiError) else internal_error(request)
        request.state.said["code"] = told.code  # the status was sent long ago
        yield _sse("error", json.dumps(told.envelope))


def _event(kind: str, body: Drawable, answer: Preview | Picture, card: Card) -> str:
    done = isinstance(answer, Picture)
    card = answer.card if isinstance(answer, Picture) else card
    event = ImageEvent(
        type=f"{kind}.completed" if done else f"{kind}.partial_image",
        b64_json=base64.b64encode(answer.image).decode(),
        created_at=int(time.time()),
        size=card.size,
        output_format=body.output_format,
        partial_image_index=None if isinstance(answer, Picture) else answer.index,
        seed=answer.seed,
        usage=usage([answer]) if isinstance(answer, Picture) else None,
        model=card.name,
        model_version=card.version,
    )
    return _sse(event.type, event.model_dump_json(exclude_none=True))


def _sse(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _image_data(body: Drawable, picture: Picture) -> ImageData:
    encoded = base64.b64encode(picture.image).decode()
    if body.response_format == "url":
        url = f"data:image/{body.output_format};base64,{encoded}"
        return ImageData(url=url, seed=picture.seed, model_version=picture.card.version)
    return ImageData(b64_json=encoded, seed=picture.seed, model_version=picture.card.version)
