"""Images as clients get them: one JSON answer, or a stream of server-sent events."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import Request

from serve.errors import ApiError, internal_error
from serve.messages import GeneratedImage, ModelInfo, PartialImage, written
from serve.schemas import (
    ImageData,
    ImageEvent,
    ImagesResponse,
    InputDetails,
    Model,
    Usage,
)
from serve.understand import Understood

logger = logging.getLogger("ray.serve")


def images_response(
    asked: Understood, images: Sequence[GeneratedImage], urls: Sequence[str] | None
) -> ImagesResponse:
    """The answer to a request.

    Args:
        asked: the request.
        images: at least one.
        urls: where the images are, one each; None: they are in the answer itself.
    """
    model = images[-1].model
    return ImagesResponse(
        created=int(time.time()),
        data=[
            ImageData(
                b64_json=base64.b64encode(image.encoded).decode() if urls is None else None,
                url=None if urls is None else urls[index],
                seed=image.seed,
                model_version=image.model.version,
            )
            for index, image in enumerate(images)
        ],
        size=_size(images[-1], model),
        output_format=asked.output.format,
        usage=_usage(images),
        model=model.name,
        model_version=model.version,
    )


def model_entry(name: str, model: ModelInfo) -> Model:
    """An entry of GET /v1/models."""
    return Model(
        id=name,
        created=model.loaded,
        version=model.version,
        size=model.size,
        styles=model.styles,
        tasks=tuple(sorted(model.tasks)),
    )


async def stream_events(
    kind: str,
    asked: Understood,
    first: PartialImage | GeneratedImage,
    rest: AsyncIterator[PartialImage | GeneratedImage],
    request: Request,
) -> AsyncIterator[str]:
    """Server-sent events: `KIND.partial_image` per partial image, `KIND.completed` with the
    finished one, or `error` if it fails on the way."""
    served: ModelInfo = await request.app.state.pool.model_info()
    try:
        yield _image_event(kind, asked, first, served)
        async for image in rest:
            yield _image_event(kind, asked, image, served)
    except Exception as error:
        if not isinstance(error, ApiError):
            logger.exception("a stream failed")
        answer = error if isinstance(error, ApiError) else internal_error(request)
        request.state.log_fields["code"] = answer.code  # the status 200 was sent long ago
        yield _event("error", json.dumps(answer.envelope))


def _image_event(
    kind: str, asked: Understood, image: PartialImage | GeneratedImage, served: ModelInfo
) -> str:
    finished = image if isinstance(image, GeneratedImage) else None
    model = finished.model if finished else served
    event = ImageEvent(
        type=f"{kind}.completed" if finished else f"{kind}.partial_image",
        b64_json=base64.b64encode(image.encoded).decode(),
        created_at=int(time.time()),
        size=_size(image, model),
        output_format=asked.output.format,
        partial_image_index=image.index if isinstance(image, PartialImage) else None,
        seed=image.seed,
        usage=_usage([finished]) if finished else None,
        model=model.name,
        model_version=model.version,
    )
    return _event(event.type, event.model_dump_json(exclude_none=True))


def _size(image: PartialImage | GeneratedImage, model: ModelInfo) -> str:
    return model.size if image.size is None else written(image.size)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _usage(images: Sequence[GeneratedImage]) -> Usage | None:
    """Tokens over all images; None if the model does not count them."""
    counts = [image.tokens for image in images if image.tokens is not None]
    if len(counts) < len(images):
        return None
    text = sum(count.text for count in counts)
    canvas = sum(count.canvas for count in counts)
    drawn = sum(count.drawn for count in counts)
    return Usage(
        input_tokens=text + canvas,
        input_tokens_details=InputDetails(text_tokens=text, image_tokens=canvas),
        output_tokens=drawn,
        total_tokens=text + canvas + drawn,
    )
