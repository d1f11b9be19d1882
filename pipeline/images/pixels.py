"""Pixels between their forms (uint8, float in [-1, 1], Pillow, PNG), and how images are resized.

The range of pixel values, and the filter that brings training and evaluation images to a size, are
defined here and nowhere else (`resize`, `resize_batch`).

    floats = to_float(pixels)        # uint8 (B, 3, H, W) -> float32 in [-1, 1]
    pixels = to_uint8(floats)        # and back, rounded

Shapes: B images of H x W pixels, 3 channels (RGB) first.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:  # preprocessing's workers do without PyTorch, which takes seconds to import
    from torch import Tensor

WHITE = (255, 255, 255)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """float (B, 3, H, W) in [-1, 1] -> uint8, rounded to nearest; what lies beyond is clamped."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).byte()


def to_pil(image: NDArray[np.uint8] | Tensor) -> Image.Image:
    """uint8 (3, H, W) -> RGB image of Pillow."""
    array = image if isinstance(image, np.ndarray) else image.cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def encode_png(image: NDArray[np.uint8] | Tensor, metadata: Mapping[str, str]) -> bytes:
    """uint8 (3, H, W) -> a PNG file; metadata goes into iTXt chunks, which hold any language."""
    info = PngInfo()
    for name, value in metadata.items():
        info.add_itxt(name, value)
    stream = io.BytesIO()
    to_pil(image).save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB image at (width, height) pixels, by Pillow's Lanczos filter.

    Its kernel widens when an image shrinks, so that fine patterns do not alias.
    """
    return image.resize(size, Image.Resampling.LANCZOS)


def resize_batch(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, side, side); the same tensor if it has that size."""
    if images.shape[-2:] == (side, side):
        return images
    import torch

    resized = [np.asarray(resize(to_pil(image), (side, side))) for image in images]
    return torch.from_numpy(np.stack(resized).transpose(0, 3, 1, 2).copy())


def gradient_l1(x: Tensor, y: Tensor) -> Tensor:
    """L1 distance between the differences of neighbouring pixels, a loss in which edges count.

    float (B, 3, H, W) both -> (B,).
    """
    horizontal = (x.diff(dim=3) - y.diff(dim=3)).abs().mean((1, 2, 3))
    return horizontal + (x.diff(dim=2) - y.diff(dim=2)).abs().mean((1, 2, 3))
