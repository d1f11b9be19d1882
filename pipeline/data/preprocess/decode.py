"""Decoding images of unknown origin into square RGB pixels, without trusting them.

Files come from the web and from users, so they may be damaged or made to exhaust the memory. An
image is opened with a closed list of formats, checked for its size before its pixels are loaded,
turned upright by its EXIF tag, composited on white, made square and resized with antialiasing.
Whatever a bad file makes Pillow raise arrives as `BadImage`, whose `reason` goes into the
quarantine table (preprocessing) or into the answer to a request (serving).

    pixels = decode(Path("apple.webp").read_bytes(), PreprocessConfig())     # uint8 (3, 64, 64)

Shapes: S = image_size pixels per side.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipeline.config import PreprocessConfig
from pipeline.data.shards.splits import hash_fraction
from pipeline.errors import TesseraError
from pipeline.images.pixels import WHITE, resize

FORMATS = ("PNG", "WEBP", "JPEG")
BAND_PIXELS = 1 << 20  # of an image that are composited and resized at a time


class BadImage(ValueError):  # noqa: N818 - a verdict on one image, not a failure of the program
    """An image that cannot be used.

    Attributes:
        reason: a key for tables and messages:
            undecodable: no PNG, WebP or JPEG, or one that Pillow cannot read;
            truncated: the file ends early;
            too_many_pixels: width * height is beyond config.max_pixels;
            too_small: a side is below config.min_side;
            extreme_aspect: the long side is beyond config.max_aspect times the short one.
            Preprocessing also uses the reasons of samples whose image could not be read from the
            shard at all: no_picture, and those of `tars.TarSample.problem`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(encoded: bytes, config: PreprocessConfig, *, key: str = "") -> NDArray[np.uint8]:
    """An encoded PNG, WebP or JPEG -> uint8 (3, S, S), RGB on white; of an animation, frame one.

    Args:
        encoded: the file's content; the format is recognised by it, not by a name.
        config: S and the limits.
        key: the sample's key; with square="random_crop" the crop's position depends on it and on
            config.crop_seed alone.

    Raises:
        BadImage: it cannot be decoded, or breaks one of the config's limits.
    """
    image = open_checked(encoded, config)
    position = 0.5
    if config.square == "random_crop":
        position = hash_fraction("crop", key, config.crop_seed)
    with raising_bad_image(encoded):
        square = make_square(image, config.square, config.image_size, position=position)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def open_checked(encoded: bytes, config: PreprocessConfig) -> Image.Image:
    """Open an image, check its size, and only then load its pixels and turn it upright.

    Raises:
        BadImage: as for `decode`.
    """
    with raising_bad_image(encoded):
        with warnings.catch_warnings():
            # config.max_pixels is the limit; Pillow's warning below its own would only repeat it
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(*image.size, config)
        image.load()
        return _upright(image)


@contextlib.contextmanager
def raising_bad_image(encoded: bytes) -> Iterator[None]:
    """Turn every error that a bad file causes in the block into BadImage.

    Beside OSError and ValueError Pillow raises struct.error, AssertionError, KeyError and more.
    Converting an image must be in such a block, too: Pillow reads palettes and transparency then.
    """
    try:
        yield
    except (BadImage, TesseraError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels") from error
    except Exception as error:
        is_truncated = "truncated" in str(error).lower() or _is_truncated_webp(encoded)
        raise BadImage("truncated" if is_truncated else "undecodable") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says; a tag that cannot be read counts as none.

    ImageOps.exif_transpose would write the whole EXIF anew, which fails on malformed tags in it.
    """
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - see `raising_bad_image`
        return image
    return image if transpose is None else image.transpose(transpose)


_TRANSPOSES: Mapping[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; a malformed tag may have a value of any type."""


def _is_truncated_webp(encoded: bytes) -> bool:
    """Pillow cannot tell a truncated WebP from a damaged one, but its header gives its length."""
    is_webp = encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP"
    return is_webp and len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")


def _check_size(width: int, height: int, config: PreprocessConfig) -> None:
    if width * height > config.max_pixels:
        raise BadImage("too_many_pixels")
    if min(width, height) < config.min_side:
        raise BadImage("too_small")
    if max(width, height) > config.max_aspect * min(width, height):
        raise BadImage("extreme_aspect")


def on_white(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; transparent pixels are composited on white, 16-bit grey is reduced to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    foreground = image.convert("RGBA")
    background = Image.new("RGBA", foreground.size, (*WHITE, 255))
    return Image.alpha_composite(background, foreground).convert("RGB")


def make_square(image: Image.Image, how: str, side: int, *, position: float = 0.5) -> Image.Image:
    """An image of any size and mode -> RGB on white, side x side pixels.

    The image is worked on in bands of rows, which needs little memory beside the image itself and
    gives the same pixels as working on the whole: the resize goes along the rows first.

    Args:
        image: what to make square.
        how: PreprocessConfig.square: "pad" with white to the long side; else crop to the short one.
        side: in pixels.
        position: of the crop along the long side, from 0 (left, top) to 1; 0.5 is the centre.
    """
    if how == "pad":
        length = max(image.size)
        left, top = (-round((length - extent) / 2) for extent in image.size)
    else:
        length = min(image.size)
        left, top = (int((extent - length) * position) for extent in image.size)
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
