"""Encoded images in, pixels out: every format, and every reason for a refusal."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.config import PreprocessConfig
from pipeline.data.preprocess import decode as decode_module
from pipeline.data.preprocess.decode import BadImage, decode, make_square, on_white

CONFIG = PreprocessConfig(image_size=32)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    data = b"IDAT" + zlib.compress(b"")
    chunks += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_images_of_the_right_size_keep_every_pixel(
    kind: str, options: dict[str, Any]
) -> None:
    image = noise(32, 32)
    found = decode(encoded(image, kind, **options), CONFIG)
    assert found.shape == (3, 32, 32) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(image).transpose(2, 0, 1))


def test_jpeg_is_turned_upright_by_its_exif_tag() -> None:
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (0, 0, 64, 32))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    found = decode(encoded(image.rotate(180), "JPEG", quality=95, exif=exif), CONFIG)
    assert found[0, :14].min() > 200 and found[2, 18:].min() > 200


def test_transparent_pixels_are_white_before_resizing() -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # black under full transparency
    image.paste((255, 0, 0, 255), (16, 16, 48, 48))
    found = decode(encoded(image), CONFIG)
    assert found[:, 0, 0].tolist() == [255, 255, 255]
    assert found[0].min() > 250, "red on white has a full red channel everywhere: no dark fringe"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16", "RGBA"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 40), 128 << 8, np.uint16))
    else:
        image = Image.new("RGB", (40, 40), (128, 128, 128)).convert(mode)
    found = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), CONFIG)
    assert found.shape == (3, 32, 32)
    if mode != "1":
        assert abs(int(found.mean()) - 128) <= 3


def test_padding_is_white_and_cropping_keeps_the_centre() -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("lime", (16, 0, 48, 32))
    padded = decode(encoded(image), CONFIG)
    cropped = decode(encoded(image), PreprocessConfig(image_size=32, square="center_crop"))
    assert padded[:, 0].min() == 255 and padded[:, 16, 0].max() == 0
    assert cropped[1].min() == 255 and cropped[0].max() == 0


@pytest.mark.parametrize("size", [(90, 40), (41, 90), (64, 64), (20, 11)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_bands_give_the_pixels_of_the_whole_image(
    size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(*size)
    if mode == "RGBA":
        image.putalpha(noise(*size).getchannel(0))
    elif mode == "P":
        image = image.quantize(7)
        image.info["transparency"] = 3
    side = max(size)
    padded = ImageOps.pad(on_white(image), (side, side), color="white")
    whole = padded.resize((32, 32), Image.Resampling.LANCZOS)
    monkeypatch.setattr(decode_module, "BAND_PIXELS", 7 * side)
    square = make_square(image, "pad", 32)
    assert np.array_equal(np.asarray(square), np.asarray(whole))


def test_a_random_crop_depends_on_key_and_seed_alone() -> None:
    image = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    file = encoded(image)

    def left(key: str, seed: int = 0) -> int:
        config = PreprocessConfig(image_size=32, square="random_crop", crop_seed=seed)
        found = decode(file, config, key=key)
        assert (np.diff(found[0, 0].astype(int)) == 1).all(), "32 neighbouring columns"
        return int(found[0, 0, 0])

    places = [left(f"k{i}") for i in range(60)]
    assert min(places) < 10 and max(places) > 86 and len(set(places)) > 30
    assert [left(f"k{i}") for i in range(60)] == places and left("k1", seed=1) != left("k1")


def test_an_animation_is_its_first_frame_and_palettes_keep_their_transparency() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind in ("PNG", "WEBP"):
        found = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), CONFIG)
        assert found[0].min() > 240 and found[2].max() < 15
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (0, 0, 16, 32))
    found = decode(encoded(palette, transparency=0), CONFIG)
    assert found[:, 5, 5].tolist() == [255, 0, 0] and found[:, 5, 25].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(orientation: int) -> None:
    upright = Image.new("RGB", (32, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    upright.paste("blue", (16, 0, 32, 16))
    turns = Image.Transpose
    stored = {
        1: [], 2: [turns.FLIP_LEFT_RIGHT], 3: [turns.ROTATE_180], 4: [turns.FLIP_TOP_BOTTOM],
        5: [turns.TRANSPOSE], 6: [turns.ROTATE_90], 7: [turns.TRANSVERSE], 8: [turns.ROTATE_270],
    }[orientation]  # fmt: skip
    image = upright
    for turn in stored:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(image, "PNG", exif=exif), CONFIG)
    np.testing.assert_array_equal(found, np.asarray(upright).transpose(2, 0, 1))


def test_shrinking_is_antialiased() -> None:
    checkers = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    found = decode(encoded(Image.fromarray(checkers)), CONFIG)
    assert found.min() >= 120 and found.max() <= 135


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "undecodable"),
        (b"not an image at all", "undecodable"),
        (encoded(noise(32, 32), "GIF"), "undecodable"),
        (encoded(noise(32, 32), "BMP"), "undecodable"),
        (encoded(noise(64, 64))[:2000], "truncated"),
        (encoded(noise(64, 64), "JPEG")[:1000], "truncated"),
        (encoded(noise(64, 64), "WEBP")[:1000], "truncated"),
        (encoded(noise(8, 64)), "too_small"),
        (encoded(noise(20, 100)), "extreme_aspect"),
        (png_header(9000, 9000), "too_many_pixels"),
        (png_header(60_000, 60_000), "too_many_pixels"),
    ],
)
def test_what_cannot_be_used_says_why(file: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(file, CONFIG)
    assert caught.value.reason == reason


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "WEBP", "JPEG"]), st.data())
def test_damaged_images_raise_nothing_but_bad_image(kind: str, data: st.DataObject) -> None:
    file = bytearray(encoded(noise(24, 24), kind))
    for _ in range(8):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(file), CONFIG).shape == (3, 32, 32)
    except BadImage as bad:
        assert bad.reason in {
            "undecodable",
            "truncated",
            "too_many_pixels",
            "too_small",
            "extreme_aspect",
        }


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (31, 31)), (6, (31, 0))])
def test_odd_tags_do_not_keep_an_image_from_being_turned(
    orientation: int, corner: tuple[int, int]
) -> None:
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack("<HHI4s", 0x0128, 2, 2, b"2\0\0\0")  # a number as text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 8, 8))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    jpeg = stream.getvalue()
    odd = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    pixels = decode(odd, PreprocessConfig(image_size=32))
    x, y = corner
    assert pixels[:, y, x].max() < 60


def test_a_palette_that_is_cut_short_is_undecodable() -> None:
    stream = io.BytesIO()
    Image.new("P", (64, 64)).save(stream, "PNG", transparency=bytes(200))
    try:
        assert decode(stream.getvalue(), PreprocessConfig()).shape == (3, 64, 64)
    except BadImage as error:
        assert error.reason == "undecodable"
