"""Openly licensed emoji with English and Chinese captions, fetched with npm.

The images of four vendors are captioned by emojibase: the default captioned images. Images and
captions come from npm packages at pinned versions, fetched with `npm pack` once into a cache
folder, checked against their SHA-256 and read without unpacking. The vendor is the style, the emoji
without skin tone is the group.

    for sample in EmojiSource(cache=Path("cache"), vendors=("noto",)).samples():
        print(sample.key, sample.captions[0].text)         # noto-1f34e red apple
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar

from PIL import Image
from pydantic import Field, model_validator

from pipeline.contracts import Caption, OptionName, Sample, Source
from pipeline.data.shards.captions import with_tags
from pipeline.data.sources._npm import Package, fetch, read_member
from pipeline.errors import DataError, MissingExtraError

SVG_SIDE = 128  # pixels per side of images that come as SVG

CAPTIONS = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
_SKIN_TONE = re.compile(r"^1F3F[B-F]$")


@dataclass(frozen=True)
class Vendor:
    """Who drew the images, where they are and what may be done with them.

    Attributes:
        package: the npm package that carries them.
        members: matches an image's path in the package; group 1 is its code points.
        license: SPDX identifier.
        attribution: the credit that the licence asks for.
    """

    package: Package
    members: re.Pattern[str]
    license: str
    attribution: str


VENDORS = {
    "noto": Vendor(
        Package(
            "emoji-datasource-google",
            "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ),
        re.compile(r"^package/img/google/64/([0-9a-f-]+)\.png$"),
        "Apache-2.0",
        "Noto Emoji, Google LLC",
    ),
    "twemoji": Vendor(
        Package(
            "emoji-datasource-twitter",
            "16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ),
        re.compile(r"^package/img/twitter/64/([0-9a-f-]+)\.png$"),
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc and other contributors",
    ),
    "fluent": Vendor(
        Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ),
        re.compile(r"^package/assets/([0-9a-f_-]+)\.webp$"),
        "MIT",
        "Fluent Emoji, Microsoft Corporation; packaged by LobeHub",
    ),
    "openmoji": Vendor(
        Package(
            "openmoji",
            "17.0.0",
            "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        ),
        re.compile(r"^package/color/svg/([0-9A-F-]+)\.svg$"),
        "CC-BY-SA-4.0",
        "OpenMoji, the open-source emoji and icon project, HfG Schwäbisch Gmünd",
    ),
}
SHIPPED_VENDORS = ("noto", "twemoji")


def hexcode(name: str) -> str:
    """A file's name or an entry's code points, however written -> 1F44B-1F3FB, without FE0F.

    >>> hexcode("23-fe0f-20e3"), hexcode("1f3f4-e0067_e0062")
    ('0023-20E3', '1F3F4-E0067-E0062')
    """
    points = name.upper().replace("_", "-").split("-")
    return "-".join(point.rjust(4, "0") for point in points if point != "FE0F")


def has_skin_tone(code: str) -> bool:
    """True for an emoji that a skin tone modifies; false for the five modifiers alone."""
    return any(_SKIN_TONE.match(point) for point in code.split("-")[1:])


def without_skin_tone(code: str) -> str:
    """The code points without skin tone modifiers (the modifier alone stays)."""
    first, *rest = code.split("-")
    return "-".join([first, *(point for point in rest if not _SKIN_TONE.match(point))])


@dataclass
class Annotations:
    """What every emoji is called, and which emoji a variant belongs to, by `hexcode`."""

    captions: dict[str, list[Caption]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def add(self, code: str, label: str, tags: Sequence[str], language: str, group: str) -> None:
        """One emoji's label and tags in one language."""
        self.captions.setdefault(code, []).extend(with_tags(label, tags, language))
        self.groups[code] = group.lower()


def read_annotations(package: Path, languages: Sequence[str]) -> Annotations:
    """Labels and tags from emojibase; a skin tone has its own label and its emoji's tags.

    Raises:
        DataError: emojibase has no such language.
    """
    annotations = Annotations()
    for language in languages:
        data = read_member(package, f"package/{language}/data.json")
        if data is None:
            raise DataError(
                f"emojibase has no captions in {language!r}; it has, among others, "
                "de, en, es, fr, ja, ko, pt, ru, zh and zh-hant"
            )
        for entry in json.loads(data):
            tags, group = entry.get("tags", ()), without_skin_tone(hexcode(entry["hexcode"]))
            for variant in (entry, *entry.get("skins", ())):
                code = hexcode(variant["hexcode"])
                annotations.add(code, variant["label"], tags, language, group)
    return annotations


def add_openmoji_extras(annotations: Annotations, package: Path) -> None:
    """Caption OpenMoji's own images, which emojibase does not know, by its English annotation.

    An image that is called like an emoji (its own pretzel) joins that emoji's group.
    """
    data = read_member(package, "package/data/openmoji.json")
    if data is None:
        raise DataError(f"{package} holds no data/openmoji.json: delete it to fetch it again")
    groups_by_label = {
        caption.text.lower(): annotations.groups[code]
        for code, captions in annotations.captions.items()
        for caption in captions
        if caption.language == "en"
    }
    for entry in json.loads(data):
        code, label = hexcode(entry["hexcode"]), entry["annotation"]
        if code not in annotations.captions:
            group = groups_by_label.get(label.lower(), without_skin_tone(code))
            annotations.add(code, label, entry["openmoji_tags"].split(","), "en", group)


class EmojiSource(Source):
    """The images of one or more vendors, captioned in one or more languages."""

    default_output: ClassVar[str | None] = "home:emoji"

    vendors: Annotated[tuple[str, ...], OptionName("vendor")] = Field(
        SHIPPED_VENDORS,
        description="Whose images to take: noto, twemoji, fluent or openmoji; may be repeated.",
    )
    languages: Annotated[tuple[str, ...], OptionName("language")] = Field(
        ("en", "zh"),
        description="Language of captions, as emojibase names it; may be repeated, and captions "
        "are stored in this order.",
    )
    skin_tones: bool = Field(False, description="Take the skin-tone variants too.")
    all_images: Annotated[bool, OptionName("all")] = Field(
        False, description="Take all vendors, with skin tones."
    )

    @model_validator(mode="after")
    def _check(self) -> EmojiSource:
        unknown = sorted(set(self.vendors) - VENDORS.keys())
        if unknown or not self.vendors:
            raise ValueError(
                f"unknown emoji vendor {', '.join(unknown) or '(none given)'}; "
                f"there are: {', '.join(VENDORS)}"
            )
        if not self.languages:
            raise ValueError("no caption language given; try en,zh")
        if "openmoji" in self._vendors():
            _load_resvg()
        return self

    def _vendors(self) -> tuple[str, ...]:
        return tuple(VENDORS) if self.all_images else tuple(dict.fromkeys(self.vendors))

    def samples(self) -> Iterator[Sample]:
        """Vendor by vendor, by code points.

        Raises:
            PretrainedNotFoundError: a package is not in the cache and cannot be fetched.
            DataError: a cached package is damaged, or emojibase lacks a language.
        """
        annotations = read_annotations(fetch(CAPTIONS, self.cache), self.languages)
        for style in self._vendors():
            package = fetch(VENDORS[style].package, self.cache)
            if style == "openmoji" and "en" in self.languages:
                add_openmoji_extras(annotations, package)
            yield from _vendor_samples(
                style, package, annotations, self.skin_tones or self.all_images
            )


SOURCE = EmojiSource


def _vendor_samples(
    style: str, package: Path, annotations: Annotations, skin_tones: bool
) -> Iterator[Sample]:
    vendor = VENDORS[style]
    images = {
        code: image
        for code, image in read_images(package, vendor.members)
        if code in annotations.captions and (skin_tones or not has_skin_tone(code))
    }
    images = dict(sorted(images.items()))
    with ThreadPoolExecutor() as pool:  # Pillow and resvg work outside the interpreter lock
        encoded = pool.map(to_webp, images.values())
        for code, image in zip(images, encoded, strict=True):
            yield Sample(
                key=f"{style}-{code.lower()}",
                image=image,
                extension="webp",
                captions=tuple(annotations.captions[code]),
                group=annotations.groups[code],
                style=style,
                source=f"{vendor.package.name}@{vendor.package.version}",
                license=vendor.license,
                attribution=f"{vendor.attribution}; captions: emojibase (MIT), Unicode CLDR",
            )


def read_images(package: Path, members: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """(hexcode, encoded image) of every member whose path matches, in the package's order."""
    with tarfile.open(package) as tar:
        for member in tar:
            match = members.match(member.name)
            if match and member.isreg():
                stream = tar.extractfile(member)
                assert stream is not None, "a regular member has a stream"
                yield hexcode(match[1]), stream.read()


def to_webp(image: bytes) -> bytes:
    """PNG or SVG -> lossless WebP with its transparency; WebP passes through unchanged."""
    if image[:4] == b"RIFF":
        return image
    if not image.startswith(b"\x89PNG"):
        image = _draw_svg(image.decode("utf-8"))
    stream = io.BytesIO()
    with Image.open(io.BytesIO(image), formats=["PNG"]) as opened:
        opened.convert("RGBA").save(stream, format="WEBP", lossless=True, method=4, quality=80)
    return stream.getvalue()


def _draw_svg(svg: str) -> bytes:
    """SVG -> PNG of SVG_SIDE x SVG_SIDE."""
    drawn = _load_resvg().svg_to_bytes(svg_string=svg, width=SVG_SIDE, height=SVG_SIDE)
    return bytes(drawn)


def _load_resvg() -> ModuleType:
    """Raises MissingExtraError without the package that draws SVG."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError("drawing OpenMoji's pictures, which are SVG,", "ingest") from error
    return resvg_py
