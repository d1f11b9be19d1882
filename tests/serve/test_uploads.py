"""Uploads as canvases: once a request, one at a time, and every transparent pixel counts."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import HashGenerator, settings
from PIL import Image, ImageFilter
from test_features import mask, png, source

from pipeline.contracts import GenerationRequest
from pipeline.errors import RequestError
from serve import uploads
from serve.messages import Fit, GeneratedImage, ImageJob, Upload
from serve.replica import GeneratorReplica
from serve.versions import ModelVersion


def test_siblings_share_one_decoded_upload_and_strangers_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, most, decoded = threading.Semaphore(0), list[int](), list[str]()
    lay_out = uploads._lay_out

    def seen(upload: Upload, image_size: int, fit: Fit) -> Any:
        decoding.release()
        most.append(decoding._value)
        decoded.append(threading.current_thread().name)
        time.sleep(0.05)
        decoding.acquire()
        return lay_out(upload, image_size, fit)

    monkeypatch.setattr(uploads, "_lay_out", seen)

    async def main() -> None:
        version = ModelVersion("tiny", "1", lambda: HashGenerator(tmp_path / "log"))
        replica = GeneratorReplica(version, None, settings())
        deadline = time.time() + 60
        jobs = [
            ImageJob(GenerationRequest("a", seed), deadline, upload=Upload(png(image), share=share))
            for image in (source(), source(64))
            for share in (0.3, 0.4)
            for seed in range(5)
        ]
        drawn = await asyncio.gather(*map(replica.generate, jobs))
        assert all(isinstance(picture, GeneratedImage) for picture in drawn)

    asyncio.run(main())
    assert len(decoded) == 4 and set(most) == {1}
    assert not any(name.startswith("model") for name in decoded)


@pytest.mark.parametrize("side", [16, 65, 100, 128, 1500])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_a_pixel_is_editable_where_anything_beneath_is_transparent(side: int, mode: str) -> None:
    numbers = np.random.default_rng(side)
    grey = np.where(numbers.random((side, side)) < 0.01, 0, 255).astype(np.uint8)
    picture = Image.fromarray(grey)
    if mode in ("RGBA", "LA"):
        alpha, picture = picture, picture.convert(mode)
        picture.putalpha(alpha)
    else:
        picture = picture.convert(mode)
        picture.info["transparency"] = 0 if mode == "P" else (0, 0, 0)
    clear = Image.fromarray((np.asarray(picture.convert("RGBA"))[..., 3] == 0).astype(np.float32))
    whole = np.asarray(clear.resize((64, 64), Image.Resampling.BOX)) > 0
    assert whole.any() and not whole.all()
    assert np.array_equal(uploads.shrink(picture, 64, "pad", uploads.transparent) > 0, whole)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (512, 64), (64, 512), (101, 16)])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_mask_lies_where_its_image_does(size: tuple[int, int], fit: Fit) -> None:
    """A red left half on blue, and a mask that is open there: the open tokens are the red ones."""
    image, hole = Image.new("RGB", size, "blue"), Image.new("RGB", size, "black")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    hole.paste("white", (0, 0, size[0] // 2, size[1]))
    made = uploads._lay_out(Upload(png(image), png(hole)), 64, fit)
    pixels = np.frombuffer(made.canvas.pixels, np.uint8).reshape(64, 64, 3).astype(int)
    assert made.canvas.mask is not None
    is_open = np.frombuffer(made.canvas.mask, np.uint8).reshape(64, 64) > 0
    is_red = (pixels[..., 0] > 200) & (pixels[..., 1:].max(2) < 60)
    is_blue = (pixels[..., 2] > 200) & (pixels[..., :2].max(2) < 60)
    assert is_red.any() and is_open[is_red].all() and not is_open[:, 36:].any()
    assert not is_open[is_blue].any()


def soft(mask: Image.Image) -> Image.Image:
    return mask.filter(ImageFilter.GaussianBlur(1))


def half(colour: str, other: str, mode: str = "RGB") -> Image.Image:
    """The upper half of one colour, the lower of another."""
    image = Image.new(mode, (128, 128), other)
    image.paste(colour, (0, 0, 128, 64))
    return image


@pytest.mark.parametrize(
    ("mask", "understood"),
    [
        (half("white", "black"), True),
        (half("white", "black", "L"), True),
        (half("white", "black", "1"), True),
        (half("white", "black", "RGBA"), True),
        (soft(half("white", "black")), True),
        (half("white", "black").convert("P"), True),
        (half("red", "black"), False),
        (half("white", "grey"), False),
        (half("white", "white"), False),
        (half("black", "black"), False),
        (source(), False),
    ],
)
def test_a_mask_of_white_in_black_is_understood_where_it_is_one(
    mask: Image.Image, understood: bool
) -> None:
    upload = Upload(png(source()), png(mask))
    if not understood:
        with pytest.raises(RequestError, match="white there and black elsewhere"):
            uploads._lay_out(upload, 64, "pad")
        return
    made = uploads._lay_out(upload, 64, "pad").canvas.mask
    assert made is not None
    is_open = np.frombuffer(made, np.uint8).reshape(64, 64) > 0
    assert is_open[:31].all() and not is_open[34:].any()


@pytest.mark.parametrize("size", [8, 64])
def test_one_transparent_pixel_of_the_largest_mask_stays_editable(size: int) -> None:
    large = mask(4096)
    large.putalpha(255)
    large.putpixel((1000, 3000), (0, 0, 0, 0))
    (place,) = np.argwhere(uploads.shrink(large, size, "pad", uploads.transparent))
    assert place.tolist() == [3000 * size // 4096, 1000 * size // 4096]


def test_memory_is_given_back_after_a_large_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[int]()
    monkeypatch.setattr(uploads, "return_memory", lambda: given.append(1))
    uploads.lay_out(Upload(png(source()), share=0.5), 64, "pad")
    assert not given
    uploads.lay_out(Upload(png(source(1500)), share=0.5), 64, "pad")
    assert given == [1]


def odd_exif(orientation: int) -> bytes:
    """A JPEG whose EXIF says a number as text, which cannot be written anew."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack("<HHI4s", 0x0128, 2, 2, b"2\0\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "JPEG")
    jpeg = stream.getvalue()
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def damaged_palette() -> bytes:
    """A PNG that is transparent at a place beyond its palette."""
    stream = io.BytesIO()
    Image.new("P", (64, 64)).save(stream, "PNG", transparency=bytes(200))
    return stream.getvalue()


@pytest.mark.parametrize("param", ["image", "mask"])
@pytest.mark.parametrize("encoded", [odd_exif(6), damaged_palette(), b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_upload_is_drawn_or_refused(param: str, encoded: bytes) -> None:
    upload = (
        Upload(encoded, share=0.5) if param == "image" else Upload(png(source(64)), mask=encoded)
    )
    try:
        made = uploads._lay_out(upload, 64, "pad")
    except RequestError as error:
        assert error.param == param and error.args[0].startswith("the ")
    else:
        assert len(made.canvas.pixels) == 3 * 64 * 64
