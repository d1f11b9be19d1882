"""Decoding images that nobody vouches for: formats and sizes are checked before pixels are loaded.

An encoded image is opened with a closed list of formats, checked for its size before its pixels
are loaded, turned upright by its EXIF tag, composited on white, made square and resized with
antialiasing. Whatever a damaged file makes the decoder raise arrives as `BadImage`, whose `reason`
goes into the quarantine table (preprocessing) or into the answer to a request (serving).

    pixels = decode(Path("apple.webp").read_bytes(), PreprocessConfig())     # uint8 (3, 64, 64)

Shapes: S = image_size pixels a side.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipeline.config import PreprocessConfig
from pipeline.errors import TesseraError
from pipeline.images import WHITE, resize
from pipeline.splits import hash_fraction

FORMATS = ("PNG", "WEBP", "JPEG")
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
