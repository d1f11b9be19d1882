"""From the square that a model draws to the image that a client asked for.

    delivered = deliver(pixels, OutputOptions(size=(1792, 1024), fit="pad"))

The image is enlarged or reduced with Pillow's Lanczos filter. One of another shape is padded with
white or cropped to its middle, as the service's setting `fit` says.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.images.pixels import WHITE, to_pil
from serve.messages import OutputOptions

FILTER = Image.Resampling.LANCZOS


def deliver(drawn: Tensor, output: OutputOptions) -> NDArray[np.uint8]:
    """The image of the size that was asked for.

    Args:
        drawn: uint8 (3, S, S), as the model drew it.
        output: the size, and what becomes of another shape.

    Returns:
        uint8 (3, H, W).
    """
    image = to_pil(drawn)
    if output.size is not None and output.size != image.size:
        if output.fit == "crop":
            image = ImageOps.fit(image, output.size, FILTER)
        else:
            image = ImageOps.pad(image, output.size, FILTER, WHITE)
    return np.asarray(image).transpose(2, 0, 1)
