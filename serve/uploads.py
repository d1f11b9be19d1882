"""Uploaded images: decoded within limits, then laid out as the canvas that a model starts from.

This runs in the replica: the ingress holds everybody's requests, so it decodes nobody's images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import PreprocessConfig
from pipeline.contracts import Canvas
from pipeline.data.preprocess.decode import (
    BAND_PIXELS,
    BadImage,
    make_square,
    open_checked,
    raising_bad_image,
)
from pipeline.errors import RequestError
from pipeline.runtime import return_memory
from serve.messages import Upload

LIMITS = PreprocessConfig(max_pixels=16_777_216, min_side=16, max_aspect=1.0)
_REASONS = {
    "too_many_pixels": f"has more than {LIMITS.max_pixels:,} pixels; send a smaller one",
    "too_small": f"is less than {LIMITS.min_side} pixels wide or high; send a larger one",
    "extreme_aspect": "is not square; crop or pad it",
    "truncated": "is cut off; send all of it",
    "undecodable": "is not a PNG, WebP or JPEG that can be read; convert it",
}


@lru_cache(maxsize=1)  # images of one request come one after the other
def canvas(upload: Upload, image_size: int) -> Canvas:
    """Decode an upload for a model of images of `image_size` pixels; the latest is remembered.

    Raises:
        RequestError: image or mask cannot be used; the message says why and what to send.
    """
    made, pixels = _lay_out(upload, image_size)
    if pixels > BAND_PIXELS:
        return_memory()
    return made


def _lay_out(upload: Upload, image_size: int) -> tuple[Canvas, int]:
    """The canvas, and how many pixels were decoded for it."""
    with _readable(upload.image, "image"):
        image = open_checked(upload.image, LIMITS)
        count = image.width * image.height
        pixels = np.asarray(make_square(image, "pad", image_size)).tobytes()
    if upload.share is not None:
        return Canvas(pixels, share=upload.share), count
    return Canvas(pixels, _editable(upload, image, image_size).tobytes()), count


@contextlib.contextmanager
def _readable(encoded: bytes, param: str) -> Iterator[None]:
    try:
        with raising_bad_image(encoded):
            yield
    except BadImage as error:
        raise RequestError(f"the {param} {_REASONS[error.reason]}", param=param) from error


def _editable(upload: Upload, image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """uint8 (S, S), 255 where a pixel of the mask is fully transparent."""
    given = upload.mask is not None
    encoded = upload.image if upload.mask is None else upload.mask
    with _readable(encoded, "mask" if given else "image"):
        mask = open_checked(encoded, LIMITS) if given else image
        if mask.size != image.size:
            raise RequestError(
                f"the mask is {mask.width}x{mask.height}, the image {image.width}x{image.height}; "
                "send a mask of the image's size",
                param="mask",
            )
        if not mask.has_transparency_data:
            missing = "has no transparency" if given else "is missing"
            raise RequestError(
                f"the mask {missing}; send a PNG that is transparent where the picture is to "
                "change",
                param="mask",
            )
        editable = _shrink(mask, image_size)
    if not editable.any():
        raise RequestError("the mask is transparent nowhere; nothing would change", param="mask")
    return editable


def _shrink(mask: Image.Image, size: int) -> NDArray[np.uint8]:
    """uint8 (size, size), 255 where any pixel of the square mask beneath is fully transparent; a
    band of rows at a time, as in decode.make_square."""
    narrow = Image.new("F", (size, mask.height))
    rows = max(1, BAND_PIXELS // mask.width)
    for first in range(0, mask.height, rows):
        band = mask.crop((0, first, mask.width, min(first + rows, mask.height)))
        clear = np.asarray(band.convert("RGBA").getchannel("A")) == 0
        shares = Image.fromarray(clear.astype(np.float32))
        narrow.paste(shares.resize((size, band.height), Image.Resampling.BOX), (0, first))
    small = np.asarray(narrow.resize((size, size), Image.Resampling.BOX))
    return np.where(small > 0, 255, 0).astype(np.uint8)
