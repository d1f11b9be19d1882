"""Malformed inputs with what must become of each: an outcome of preprocessing, never an error."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.contracts import Caption, Sample
from pipeline.data.shards.manifest import Shard, dataset_digest
from pipeline.data.shards.writer import write_shards

GOOD = 20


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG's head with the given chunks and no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *more)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg_header(width: int, height: int) -> bytes:
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"


def pictures() -> dict[str, tuple[bytes, str]]:
    """Pictures and outcomes by name."""
    image = noise(64, 64)
    files = {kind: encode(image, kind) for kind in ("PNG", "JPEG", "WEBP")}
    frames = [noise(32, 32, seed) for seed in (1, 2)]
    crc = bytearray(files["PNG"])
    crc[30] ^= 0xFF
    found = {
        "zero-bytes": (b"", "undecodable"),
        "zeros": (bytes(4096), "undecodable"),
        "text": (b"this is no picture", "undecodable"),
        "html": (b"<html><img src=x></html>", "undecodable"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "undecodable"),
        "gif": (encode(image, "GIF"), "undecodable"),
        "bmp": (encode(image, "BMP"), "undecodable"),
        "tiff": (encode(image, "TIFF"), "undecodable"),
        "ico": (encode(image, "ICO"), "undecodable"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),
        "png-signature-alone": (files["PNG"][:8], "undecodable"),
        "png-bad-crc": (bytes(crc), "undecodable"),
        "png-no-pixels": (png(64, 64, (b"IEND", b"")), "undecodable"),
        "png-garbage-pixels": (
            png(64, 64, (b"IDAT", b"no zlib stream"), (b"IEND", b"")), "undecodable"),
        "png-bomb": (png(60_000, 60_000, (b"IDAT", b"")), "too_many_pixels"),
        "png-small-bomb": (png(9_000, 9_000, (b"IDAT", b"")), "too_many_pixels"),
        "png-text-bomb": (
            png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))), "undecodable"),
        "jpeg-bomb": (jpeg_header(65_000, 65_000), "too_many_pixels"),
        "one-pixel": (encode(noise(1, 1), "PNG"), "too_small"),
        "line": (encode(noise(20_000, 1), "PNG"), "too_small"),
        "ribbon": (encode(noise(20_000, 16), "PNG"), "extreme_aspect"),
        "tower": (encode(noise(20, 90), "JPEG"), "extreme_aspect"),
        "animated-gif": (
            encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "undecodable"),
        "animated-webp": (
            encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "accepted"),
        "animated-png": (
            encode(frames[0], "PNG", save_all=True, append_images=frames[1:]), "accepted"),
        "cmyk": (encode(image.convert("CMYK"), "JPEG"), "accepted"),
        "progressive": (encode(noise(64, 64, 7), "JPEG", progressive=True), "accepted"),
        "grey-jpeg": (encode(image.convert("L"), "JPEG"), "accepted"),
        "palette": (encode(image.convert("P"), "PNG", transparency=3), "accepted"),
        "bits": (encode(image.convert("1"), "PNG"), "accepted"),
        "polyglot-zip": (files["PNG"] + b"PK\x03\x04" + bytes(99), "accepted"),
        "polyglot-php": (files["JPEG"] + b"<?php system('x'); ?>", "accepted"),
        "polyglot-gif": (b"GIF89a" + files["JPEG"], "undecodable"),
        "polyglot-pdf": (b"%PDF-1.7\n" + files["JPEG"], "undecodable"),
    }  # fmt: skip
    for kind, content in files.items():
        for share in (0.3, 0.6, 0.95):
            cut = content[: int(len(content) * share)]
            found[f"{kind.lower()}-cut-at-{share:.0%}".replace("%", "")] = (cut, "truncated")
    return found


def records() -> dict[str, tuple[bytes | None, str]]:
    """KEY.json contents and outcomes by name."""
    good = record("x")

    def changed(**changes: Any) -> bytes:
        return json.dumps({**good, **changes}).encode()

    def captioned(text: Any, language: Any = "en") -> bytes:
        return changed(captions=[{"text": text, "language": language}])

    return {
        "no-json": (None, "bad_json"),
        "empty-json": (b"", "bad_json"),
        "half-json": (changed()[:40], "bad_json"),
        "list-json": (b"[]", "bad_json"),
        "deep-json": (b"[" * 100_000, "bad_json"),
        "json-bad-utf8": (changed().replace(b'"x"', b'"\xff"'), "bad_utf8"),
        "json-latin-1": ('{"group": "café"}'.encode("latin-1"), "bad_utf8"),
        "json-utf16": (changed().decode().encode("utf-16"), "bad_utf8"),
        "no-captions": (changed(captions=None), "bad_json"),
        "captions-text": (changed(captions="a dog"), "bad_json"),
        "captions-number": (captioned(7), "bad_json"),
        "captions-no-language": (captioned("dog", None), "bad_json"),
        "captions-empty": (changed(captions=[]), "empty_caption"),
        "caption-blank": (captioned(" \t\n "), "empty_caption"),
        "caption-control": (captioned("\x00\x07"), "empty_caption"),
        "caption-long": (captioned("x" * 1_001), "long_caption"),
        "caption-half-emoji": (captioned("\ud83d"), "bad_utf8"),
        "caption-half-language": (captioned("dog", "\udc00"), "bad_utf8"),
        "no-license": (changed(license=None), "bad_json"),
        "group-number": (changed(group=7), "bad_json"),
        "style-half-emoji": (changed(style="\ud83d"), "bad_utf8"),
        "emoji-caption": (captioned("🍎 e\u0301"), "accepted"),
    }


def record(key: str) -> dict[str, Any]:
    return {
        "captions": [{"text": f"thing {key}", "language": "en"}],
        "group": key,
        "style": "photo",
        "source": "test@1",
        "license": "MIT",
        "attribution": "nobody",
    }


def good_samples() -> Iterator[Sample]:
    for i in range(GOOD):
        yield Sample(
            key=f"good-{i}",
            image=encode(noise(24, 24, 100 + i), "WEBP", lossless=True),
            extension="webp",
            captions=(Caption(f"thing {i}", "en"),),
            group=f"g{i}",
            style="photo",
            source="test@1",
            license="MIT",
            attribution="nobody",
        )


def write_corpus(folder: Path) -> dict[str, list[str]]:
    """A shard set of one good shard and one that holds every malformed input.

    Returns:
        Expected outcomes by key, one a sample of that key.
    """
    manifest = write_shards(good_samples(), folder)
    expected = {f"good-{i}": ["accepted"] for i in range(GOOD)}
    path = folder / "00001-000000000000.tar"
    with tarfile.open(path, "w") as out:

        def add(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            info.linkname = "good-0.webp"
            out.addfile(info, io.BytesIO(content))

        def add_sample(key: str, picture: bytes | None, text: bytes | None, outcome: str) -> None:
            if text is not None:
                add(f"{key}.json", text)
            if picture is not None:
                add(f"{key}.png", picture)  # whatever it is: names prove nothing
            expected.setdefault(key, []).append(outcome)

        def text(key: str) -> bytes:
            return json.dumps(record(key)).encode()

        for key, (picture, outcome) in pictures().items():
            add_sample(key, picture, text(key), outcome)
        for number, (key, (content, outcome)) in enumerate(records().items()):
            add_sample(key, encode(noise(24, 24, 200 + number), "PNG"), content, outcome)
        fine = [encode(noise(24, 24, 300 + i), "PNG") for i in range(9)]
        add_sample("no-picture", None, text("no-picture"), "no_picture")
        add_sample("../../escape", fine[0], text("escape"), "unsafe_name")
        add_sample("/absolute", fine[1], text("absolute"), "unsafe_name")
        for key, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            add(f"{key}.json", text(key))
            add(f"{key}.png", b"", kind)
            expected[key] = ["link"]
        add_sample("twice", fine[2], text("twice"), "accepted")
        add_sample("twice", fine[3], text("twice"), "duplicate_key")
        add_sample("good-3", fine[4], text("good-3"), "duplicate_key")
        add("apart.json", text("apart"))
        add_sample("between", fine[5], text("between"), "accepted")
        add("apart.png", fine[6])
        expected["apart"] = ["no_picture", "scattered_key"]
    shard = sign(path, sum(map(len, expected.values())) - GOOD)
    shards = (*manifest.shards, shard)
    changes = {"shards": shards, "digest": dataset_digest(shards)}
    (folder / "manifest.json").write_text(manifest.model_copy(update=changes).model_dump_json())
    return expected


def sign(path: Path, samples: int) -> Shard:
    """A tar's entry in a manifest."""
    content = path.read_bytes()
    return Shard(
        file=path.name,
        samples=samples,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
