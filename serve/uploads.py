"""Uploaded images: decoded within limits, then laid out as the canvas that a model starts from.

This runs in the replica: the ingress holds everybody's requests, so it decodes nobody's images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import PreprocessConfig
from pipeline.contracts import Canvas
from pipeline.data.preprocess.decode import (
    BAND_PIXELS,
    BadImage,
    on_white,
    open_checked,
    raising_bad_image,
)
from pipeline.errors import RequestError
from pipeline.runtime import return_memory
from serve.delivery import Placement, bands, place
from serve.messages import STRENGTH, Fit, Upload

LIMITS = PreprocessConfig(max_pixels=16_777_216, min_side=16, max_aspect=8.0)
_REASONS = {
    "too_many_pixels": f"has more than {LIMITS.max_pixels:,} pixels; send a smaller one",
    "too_small": f"is less than {LIMITS.min_side} pixels wide or high; send a larger one",
    "extreme_aspect": f"is more than {LIMITS.max_aspect:g} times as long as wide; crop it",
    "truncated": "is cut off; send all of it",
    "undecodable": "is not a PNG, WebP or JPEG that can be read; convert it",
}
_MASKS = (
    "send a PNG that is fully transparent where the picture is to change, or one that is white "
    "there and black elsewhere"
)
_NEAR = 32
"""Levels, of 256, that a pixel's channels may be away from black or white."""
_MOSTLY = 0.95
"""Share of a mask's pixels that are black or white: the rest may be edges."""


@dataclass(frozen=True)
class LaidOut:
    """An upload as a model can go on from it.

    Attributes:
        canvas: what the model is given.
        placement: how the canvas becomes an image of the upload's shape again.
        masked: whether a mask says where to generate anew; else the canvas' share does.
        num_pixels: that were decoded for it.
    """

    canvas: Canvas
    placement: Placement | None
    masked: bool
    num_pixels: int


@lru_cache(maxsize=1)  # images of one request come one after the other
def lay_out(upload: Upload, image_size: int, fit: Fit) -> LaidOut:
    """Decode an upload for a model of images of `image_size` pixels; the latest is remembered.

    Args:
        upload: the image and perhaps its mask.
        image_size: pixels per side of the model's images.
        fit: what becomes of an upload that is not square.

    Raises:
        RequestError: image or mask cannot be used; the message says why and what to send.
    """
    made = _lay_out(upload, image_size, fit)
    if made.num_pixels > BAND_PIXELS:
        return_memory()
    return made


def _lay_out(upload: Upload, image_size: int, fit: Fit) -> LaidOut:
    with _readable(upload.image, "image"):
        image = open_checked(upload.image, LIMITS)
        if fit == "refuse" and image.width != image.height:
            raise RequestError("the image is not square; crop or pad it", param="image")
        square, placement = place(image, fit, image_size)
    editable = _editable(upload, image, image_size, fit)
    canvas = (
        Canvas(square.tobytes(), share=STRENGTH if upload.share is None else upload.share)
        if editable is None
        else Canvas(square.tobytes(), editable.tobytes())
    )
    return LaidOut(canvas, placement, editable is not None, image.width * image.height)


@contextlib.contextmanager
def _readable(encoded: bytes, param: str) -> Iterator[None]:
    try:
        with raising_bad_image(encoded):
            yield
    except BadImage as error:
        raise RequestError(f"the {param} {_REASONS[error.reason]}", param=param) from error


def _editable(upload: Upload, image: Image.Image, side: int, fit: Fit) -> NDArray[np.uint8] | None:
    """uint8 (S, S), 255 where the image is to be generated anew; None: nothing says where."""
    if upload.mask is None:
        if not (upload.transparency_is_mask and image.has_transparency_data):
            return None
        with _readable(upload.image, "image"):
            clear = shrink(image, side, fit, transparent)
        return clear if clear.any() else None
    with _readable(upload.mask, "mask"):
        mask = open_checked(upload.mask, LIMITS)
        _check_shape(mask, image)
        open_at = white if _is_black_and_white(mask) else transparent
        editable = shrink(mask, side, fit, open_at)
    if not editable.any():
        raise RequestError(f"the mask leaves nothing to change; {_MASKS}", param="mask")
    return editable


def _check_shape(mask: Image.Image, image: Image.Image) -> None:
    """Raises RequestError unless the mask, enlarged or reduced, covers the image to the pixel."""
    difference = abs(mask.width * image.height - mask.height * image.width)
    if difference > max(*mask.size, *image.size):
        raise RequestError(
            f"the mask is {mask.width}x{mask.height}, the image {image.width}x{image.height}; "
            "send a mask of the image's shape",
            param="mask",
        )


def transparent(band: Image.Image) -> NDArray[np.bool_]:
    """Bool (H, W): where a band of rows is fully transparent."""
    clear: NDArray[np.bool_] = np.asarray(band.convert("RGBA").getchannel("A")) == 0
    return clear


def white(band: Image.Image) -> NDArray[np.bool_]:
    """Bool (H, W): where a black and white band of rows is white."""
    bright: NDArray[np.bool_] = np.asarray(on_white(band).convert("L")) > 127
    return bright


def _is_black_and_white(mask: Image.Image) -> bool:
    """Whether a mask cannot be mistaken for anything but white in black: it is transparent nowhere,
    and both colours and nearly no other occur."""
    dark = light = 0
    for band, _ in bands(mask):
        if mask.has_transparency_data and transparent(band).any():
            return False
        pixels = np.asarray(on_white(band))
        dark += int(np.count_nonzero(pixels.max(axis=2) <= _NEAR))
        light += int(np.count_nonzero(pixels.min(axis=2) >= 255 - _NEAR))
    return min(dark, light) > 0 and dark + light >= _MOSTLY * mask.width * mask.height


def shrink(
    mask: Image.Image, side: int, fit: Fit, open_at: Callable[[Image.Image], NDArray[np.bool_]]
) -> NDArray[np.uint8]:
    """Bring a mask onto the square that the model works on, where its image lies too.

    Args:
        mask: of any mode.
        side: S.
        fit: as for the image, see `delivery.place`.
        open_at: tells of a band of rows, bool (H, W), where it is open.

    Returns:
        uint8 (S, S), 255 where any pixel of the mask beneath is open.
    """
    length = min(mask.size) if fit == "crop" else max(mask.size)
    rounded = int if fit == "crop" else round  # as make_square rounds
    left, top = (rounded((length - extent) / 2) for extent in mask.size)
    narrow = Image.new("F", (side, length))
    for band, first in bands(mask):
        shares = Image.fromarray(open_at(band).astype(np.float32))
        row = Image.new("F", (length, band.height))
        row.paste(shares, (left, 0))
        narrow.paste(row.resize((side, band.height), Image.Resampling.BOX), (0, first + top))
    small = np.asarray(narrow.resize((side, side), Image.Resampling.BOX))
    return np.where(small > 0, 255, 0).astype(np.uint8)
