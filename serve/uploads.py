"""Uploaded pictures: looked at with suspicion, then laid out as the canvas a model goes on from.

Runs in the replica: the ingress holds other users' requests and decodes nothing of anybody's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import PreprocessConfig
from pipeline.contracts import Canvas
from pipeline.errors import RequestError
from pipeline.images import BadPicture, make_square, open_checked
from serve.pictures import Upload

LIMITS = PreprocessConfig(max_pixels=16_777_216, min_side=16, max_aspect=1.0)
_REASONS = {
    "bomb": f"has more than {LIMITS.max_pixels:,} pixels; send a smaller one",
    "too_small": f"is less than {LIMITS.min_side} pixels wide or high; send a larger one",
    "extreme_aspect": "is not square; crop or pad it",
    "truncated": "is cut off; send all of it",
    "undecodable": "is not a PNG, WebP or JPEG that can be read; convert it",
}


def canvas(upload: Upload, image_size: int) -> Canvas:
    """Decode an upload for a model that draws image_size pixels a side.

    Raises:
        RequestError: image or mask cannot be used; the message says why and what to send.
    """
    image = _open(upload.image, "image")
    pixels = np.asarray(make_square(image, "pad", image_size)).tobytes()
    if upload.share is not None:
        return Canvas(pixels, share=upload.share)
    return Canvas(pixels, _editable(upload, image, image_size).tobytes())


def _open(encoded: bytes, param: str) -> Image.Image:
    try:
        return open_checked(encoded, LIMITS)
    except BadPicture as error:
        raise RequestError(f"the {param} {_REASONS[error.reason]}", param=param) from error


def _editable(upload: Upload, image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """uint8 (S, S), 255 where a pixel of the mask is fully transparent."""
    mask = image
    if upload.mask is not None:
        mask = _open(upload.mask, "mask")
        if mask.size != image.size:
            raise RequestError(
                f"the mask is {mask.width}x{mask.height}, the image {image.width}x{image.height}; "
                "send a mask of the image's size",
                param="mask",
            )
    if not mask.has_transparency_data:
        missing = "has no transparency" if upload.mask is not None else "is missing"
        raise RequestError(
            f"the mask {missing}; send a PNG that is transparent where the picture is to change",
            param="mask",
        )
    clear = np.asarray(mask.convert("RGBA").getchannel("A")) == 0
    if not clear.any():
        raise RequestError("the mask is transparent nowhere; nothing would change", param="mask")
    return _shrink(clear, image_size)


def _shrink(clear: NDArray[np.bool_], size: int) -> NDArray[np.uint8]:
    """bool (H, H) -> uint8 (size, size), 255 where any pixel beneath is True."""
    picture = Image.fromarray(clear.astype(np.float32))
    small = np.asarray(picture.resize((size, size), Image.Resampling.BOX))
    return np.where(small > 0, 255, 0).astype(np.uint8)
