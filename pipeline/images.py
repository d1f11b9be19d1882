"""Pixel range and resize, said once: encoded pictures, uint8 arrays and floats in [-1, 1].

A picture is decoded with a closed list of formats, checked for size before its pixels are loaded,
turned upright by its EXIF tag, composited on white, squared and resized with antialiasing.

    pixels = decode(Path("apple.webp").read_bytes(), PreprocessConfig())     # uint8 (3, 64, 64)
    grid(pixels[None], columns=1).save("apple.png")

Shapes: B pictures, S = image_size pixels a side.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from pipeline.config import PreprocessConfig
from pipeline.errors import TesseraError
from pipeline.labels import draw_label, load_font
from pipeline.splits import hash_fraction

if TYPE_CHECKING:  # preprocessing's workers decode without PyTorch, which takes seconds to import
    from torch import Tensor

FORMATS = ("PNG", "WEBP", "JPEG")
WHITE = (255, 255, 255)
BAND_PIXELS = 1 << 20  # composited and narrowed at once


class BadImage(ValueError):  # noqa: N818 - a verdict on one row, not a failure of the program
    """A picture that cannot be used.

    Attributes:
        reason: undecodable, truncated, bomb, too_small or extreme_aspect.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(encoded: bytes, config: PreprocessConfig, *, key: str = "") -> NDArray[np.uint8]:
    """An encoded PNG, WebP or JPEG (an animation's first frame) -> uint8 (3, S, S) RGB on white.

    Args:
        encoded: the file, whatever its name says it is.
        config: size and limits.
        key: where square="random_crop" cuts depends on it and config.crop_seed alone.

    Raises:
        BadImage: it cannot be decoded, or breaks one of the config's limits.
    """
    image = open_checked(encoded, config)
    where = 0.5
    if config.square == "random_crop":
        where = hash_fraction("crop", key, config.crop_seed)
    with reading(encoded):
        square = make_square(image, config.square, config.image_size, where=where)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def open_checked(encoded: bytes, config: PreprocessConfig) -> Image.Image:
    """Open, check the size, only then load the pixels and turn the picture upright.

    Raises:
        BadImage: as for `decode`.
    """
    with reading(encoded):
        with warnings.catch_warnings():
            # config.max_pixels is the limit; Pillow's warning below its own would only repeat it
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(*image.size, config)
        image.load()
        return _upright(image)


@contextlib.contextmanager
def reading(encoded: bytes) -> Iterator[None]:
    """Whatever a damaged file makes Pillow raise in here is a BadImage: beside OSError and
    ValueError there are struct.error, AssertionError, KeyError and more, and palettes and
    transparency are only looked at when a picture is converted."""
    try:
        yield
    except (BadImage, TesseraError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("bomb") from error
    except Exception as error:
        cut = "truncated" in str(error).lower() or _is_cut_webp(encoded)
        raise BadImage("truncated" if cut else "undecodable") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says; a tag that cannot be read says nothing.

    ImageOps.exif_transpose would write the whole EXIF anew, which odd tags in it prevent.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - see `reading`
        return image
    return image if turn is None else image.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation."""


def _is_cut_webp(encoded: bytes) -> bool:
    """Pillow does not say that a WebP is truncated; its RIFF header names its length."""
    is_webp = encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP"
    return is_webp and len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")


def _check_size(width: int, height: int, config: PreprocessConfig) -> None:
    if width * height > config.max_pixels:
        raise BadImage("bomb")
    if min(width, height) < config.min_side:
        raise BadImage("too_small")
    if max(width, height) > config.max_aspect * min(width, height):
        raise BadImage("extreme_aspect")


def on_white(image: Image.Image) -> Image.Image:
    """RGB, transparent pixels composited on white, 16-bit grey reduced to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    ground = Image.new("RGBA", picture.size, (*WHITE, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def make_square(image: Image.Image, how: str, side: int, *, where: float = 0.5) -> Image.Image:
    """Any picture to RGB on white, side x side; Pillow's Lanczos widens its kernel when it shrinks.

    A band of rows at a time, which gives the same pixels as the whole at once (the resize goes
    along the rows first) and needs little memory beside the picture itself.

    Args:
        image: of any size and mode.
        how: PreprocessConfig.square: pad with white to the long side ("pad") or cut to the short.
        side: in pixels.
        where: the cut along the long side, from 0 (left, top) to 1; 0.5 is the centre.
    """
    if how == "pad":
        length = max(image.size)
        left, top = (-round((length - extent) / 2) for extent in image.size)
    else:
        length = min(image.size)
        left, top = (int((extent - length) * where) for extent in image.size)
    right, bottom = min(left + length, image.width), min(top + length, image.height)
    narrow = Image.new("RGB", (side, length), WHITE)
    rows = max(1, BAND_PIXELS // length)
    for first in range(max(top, 0), bottom, rows):
        band = on_white(image.crop((max(left, 0), first, right, min(first + rows, bottom))))
        if band.width < length:
            padded = Image.new("RGB", (length, band.height), WHITE)
            padded.paste(band, (-left, 0))
            band = padded
        narrow.paste(resize(band, (side, band.height)), (0, first - top))
    return resize(narrow, (side, side))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB to (width, height), with antialiasing."""
    return image.resize(size, Image.Resampling.LANCZOS)


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, side, side), as they are if they have that size."""
    if images.shape[-2:] == (side, side):
        return images
    import torch

    pictures = [np.asarray(resize(to_pil(image), (side, side))) for image in images]
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """float (B, 3, H, W) in [-1, 1], anything beyond clamped -> uint8, rounded to nearest."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).byte()


def gradient_l1(x: Tensor, y: Tensor) -> Tensor:
    """L1 distance of horizontal and vertical differences, a loss in which edges count.

    float (B, 3, H, W) both -> (B,).
    """
    horizontal = (x.diff(dim=3) - y.diff(dim=3)).abs().mean((1, 2, 3))
    return horizontal + (x.diff(dim=2) - y.diff(dim=2)).abs().mean((1, 2, 3))


def to_pil(image: NDArray[np.uint8] | Tensor) -> Image.Image:
    """uint8 (3, H, W) -> RGB picture."""
    array = image if isinstance(image, np.ndarray) else image.cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def encode_png(image: NDArray[np.uint8] | Tensor, metadata: Mapping[str, str]) -> bytes:
    """uint8 (3, H, W) -> PNG bytes; metadata becomes iTXt chunks, so any language is kept."""
    info = PngInfo()
    for name, value in metadata.items():
        info.add_itxt(name, value)
    stream = io.BytesIO()
    to_pil(image).save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def grid(
    images: NDArray[np.uint8] | Tensor,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    scale: int = 1,
    gap: int = 4,
) -> Image.Image:
    """Pictures side by side, row by row, on white.

    Args:
        images: uint8 (B, 3, H, W).
        columns: pictures a row.
        row_labels: one a row, drawn left of it.
        column_labels: one a column, drawn above it.
        captions: one a picture, drawn below it and cut to its width.
        scale: every pixel becomes scale x scale.
        gap: pixels between pictures.

    Raises:
        ValueError: fewer than one column, or labels that do not match the pictures in number.
    """
    num_rows = _num_rows(len(images), columns, row_labels, column_labels, captions)
    pictures = [to_pil(image) for image in images]
    cell_w, cell_h = (side * scale for side in pictures[0].size)
    font = load_font()
    line = sum(font.getmetrics()) + 2
    left = max((round(font.getlength(label)) + gap for label in row_labels), default=0)
    top = line if column_labels else 0
    step_x, step_y = cell_w + gap, cell_h + gap + (line if captions else 0)
    size = (left + columns * step_x + gap, top + num_rows * step_y + gap)
    canvas = Image.new("RGB", size, WHITE)
    for index, picture in enumerate(pictures):
        x = left + gap + index % columns * step_x
        y = top + gap + index // columns * step_y
        canvas.paste(picture.resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        if captions:
            draw_label(canvas, (x, y + cell_h), captions[index], font, max_width=cell_w)
    for row, label in enumerate(row_labels):
        y = top + gap + row * step_y + (cell_h - line) // 2
        draw_label(canvas, (gap, y), label, font, max_width=left)
    for column, label in enumerate(column_labels):
        x = left + gap + column * step_x
        draw_label(canvas, (x, 0), label, font, max_width=cell_w)
    return canvas


def _num_rows(
    num_images: int,
    columns: int,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[str],
) -> int:
    if num_images < 1 or columns < 1:
        raise ValueError(f"a grid needs pictures and columns, got {num_images} and {columns}")
    num_rows = -(-num_images // columns)
    counts = {
        "row_labels": (len(row_labels), num_rows),
        "column_labels": (len(column_labels), columns),
        "captions": (len(captions), num_images),
    }
    for name, (given, wanted) in counts.items():
        if given not in (0, wanted):
            raise ValueError(f"{name} has {given} entries, the grid needs {wanted}")
    return num_rows
