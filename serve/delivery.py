"""Between the shapes that clients have and the square that a model works on: the way in, for images
that are uploaded, and the way out.

    square, placement = place(photograph, "pad", 64)      # 640x480 in the middle of 64x64
    ...                                                   # the model works on the square
    delivered = deliver(drawn, output, placement)         # 64x48, or output.size

Images are enlarged and reduced with Pillow's Lanczos filter. One of another shape is padded with
white or cropped to its middle, as the service's setting `fit` says. An upload is given back in its
own shape, at the scale at which the model worked: without its padding, or with what was cropped.

Shapes: S = image_size, pixels per side of the model's images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.data.preprocess.decode import BAND_PIXELS, make_square, on_white
from pipeline.images.pixels import WHITE, resize, to_pil
from serve.messages import Fit, OutputOptions, Size

FILTER = Image.Resampling.LANCZOS

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Placement:
    """How an upload that is not square became the square that the model works on.

    Attributes:
        box: of the upload in the square, which was padded; or of the square in `whole`.
        whole: the upload from which the square was cropped; None: it was padded.
    """

    box: Box
    whole: Image.Image | None = None

    def undone(self, drawn: Image.Image) -> Image.Image:
        """The drawn square in the upload's own shape."""
        if self.whole is None:
            return drawn.crop(self.box)
        restored = self.whole.copy()
        restored.paste(drawn, self.box)
        return restored


def place(image: Image.Image, fit: Fit, side: int) -> tuple[Image.Image, Placement | None]:
    """An image as the square of S = `side` that a model works on.

    Args:
        image: of any size and mode.
        fit: "crop", else it is padded.
        side: S.

    Returns:
        S x S pixels, RGB on white, and how they are placed; None: the image was square.
    """
    square = make_square(image, "crop" if fit == "crop" else "pad", side)
    if image.width == image.height:
        return square, None
    if fit != "crop":
        return square, Placement(_middle(_within(image.size, side), side, side))
    size = _within(image.size, round(side * max(image.size) / min(image.size)))
    return square, Placement(_middle((side, side), *size), _reduced(image, size))


def bands(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """An image as bands of rows, of BAND_PIXELS pixels at most, each with its first row: what is
    done to them one by one needs little memory beside the image."""
    rows = max(1, BAND_PIXELS // image.width)
    for first in range(0, image.height, rows):
        yield image.crop((0, first, image.width, min(first + rows, image.height))), first


def _reduced(image: Image.Image, size: Size) -> Image.Image:
    """An image of any size and mode -> RGB on white, of `size`."""
    narrow = Image.new("RGB", (size[0], image.height))
    for band, first in bands(image):
        narrow.paste(resize(on_white(band), (size[0], band.height)), (0, first))
    return resize(narrow, size)


def _within(size: Size, side: int) -> Size:
    """The size at which an image of `size` is `side` pixels along its long side."""
    width, height = (max(1, round(side * extent / max(size))) for extent in size)
    return width, height


def _middle(size: Size, width: int, height: int) -> Box:
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def deliver(
    drawn: Tensor, output: OutputOptions, placement: Placement | None = None
) -> NDArray[np.uint8]:
    """The image in the shape and of the size that was asked for.

    Args:
        drawn: uint8 (3, S, S), as the model drew it.
        output: the size, and what becomes of another shape.
        placement: of the upload that it was drawn from.

    Returns:
        uint8 (3, H, W).
    """
    image = to_pil(drawn)
    if placement is not None:
        image = placement.undone(image)
    if output.size is not None and output.size != image.size:
        if output.fit == "crop":
            image = ImageOps.fit(image, output.size, FILTER)
        else:
            image = ImageOps.pad(image, output.size, FILTER, WHITE)
    return np.asarray(image).transpose(2, 0, 1)
