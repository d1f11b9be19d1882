"""A COCO captions file of the 2014 or 2017 layout; licences are the file's own.

Every image has its captions (five, mostly), its own licence and its address as credit, and is its
own group. An image that the folder lacks becomes a sample without one, which preprocessing
quarantines.

    CocoSource(annotations="annotations/captions_val2017.json", images="val2017").samples()
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field

from pipeline.contracts import Caption, Positional, Sample
from pipeline.data.shards.manifest import open_uri
from pipeline.data.sources import CaptionedSource
from pipeline.data.sources._files import EXTENSIONS, Folder, make_sample
from pipeline.errors import DataError

_CREATIVE_COMMONS = re.compile(
    r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)/([\d.]+)(?:/([a-z]{2})\b)?"
)
_PUBLIC_DOMAIN = {"zero": "CC0", "mark": "CC-PDM"}


class CocoSource(CaptionedSource):
    """The images of a COCO captions file."""

    annotations: Annotated[str, Positional()] = Field(
        min_length=1,
        description="The captions file, for example captions_train2017.json: a path or URI.",
    )
    images: Annotated[str, Positional()] = Field(
        min_length=1, description="The folder that its images are in: a directory or URI."
    )
    license: str = Field(
        "NOASSERTION",
        min_length=1,
        description="Licence of the images for which the file names none, as an SPDX identifier.",
    )

    def samples(self) -> Iterator[Sample]:
        """By image id.

        Raises:
            DataError: there is no such file or folder, the file has no COCO captions, or the folder
                has none of its images.
        """
        content = self._read()
        folder, credits = Folder.at(self.images), self.credits(self.annotations)
        there = set(folder.names())
        if there.isdisjoint(entry["file_name"] for entry in content.entries):
            raise DataError(
                f"none of the {len(content.entries)} pictures of {self.annotations} is in "
                f"{self.images}; the first is {content.entries[0]['file_name']}"
            )
        names = [e["file_name"] if e["file_name"] in there else None for e in content.entries]
        for entry, image in zip(content.entries, folder.contents(names), strict=True):
            path = PurePosixPath(entry["file_name"])
            said = {
                "license": content.licenses.get(entry.get("license")),
                "attribution": entry.get("flickr_url") or entry.get("coco_url"),
            }
            yield make_sample(
                str(path.with_suffix("")),
                image,
                EXTENSIONS.get(path.suffix.lower(), "jpg"),
                content.captions.get(entry["id"], []),
                credits.fill(said, group=f"coco-{entry['id']}"),
            )

    def _read(self) -> _Content:
        fs, path = open_uri(self.annotations)
        try:
            with fs.open_input_stream(path) as stream:
                content = _parsed(json.loads(stream.read()), self.language)
        except FileNotFoundError as error:
            raise DataError(f"there is no file {self.annotations}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{self.annotations} is no COCO captions file ({type(error).__name__}: {error}): "
                "it needs `images` with id and file_name, and `annotations` with id, image_id and "
                "caption"
            ) from error
        if not content.entries:
            raise DataError(f"{self.annotations} lists no pictures")
        return content


SOURCE = CocoSource


@dataclass(frozen=True)
class _Content:
    """What a captions file says.

    Attributes:
        entries: its images, by their id.
        captions: by image id.
        licenses: SPDX identifiers, by licence id.
    """

    entries: list[dict[str, Any]]
    captions: dict[Any, list[Caption]]
    licenses: dict[Any, str]


def _parsed(content: Any, language: str) -> _Content:
    """Raises KeyError, TypeError, AttributeError or ValueError where the layout is another."""
    entries = sorted(content["images"], key=lambda entry: entry["id"])
    captions: dict[Any, list[Caption]] = {}
    for note in sorted(content["annotations"], key=lambda note: note["id"]):
        if text := note["caption"].strip():
            captions.setdefault(note["image_id"], []).append(Caption(text, language))
    licenses = {item["id"]: spdx(item) for item in content.get("licenses", ())}
    for entry in entries:
        PurePosixPath(entry["file_name"])  # raises where it is no text
    return _Content(entries, captions, licenses)


def spdx(license: dict[str, Any]) -> str:
    """A COCO licence -> its SPDX identifier, else its name.

    >>> spdx({"id": 1, "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "name": "..."})
    'CC-BY-NC-SA-2.0'
    """
    found = _CREATIVE_COMMONS.search(license.get("url", ""))
    if found is None:
        return str(license.get("name", "NOASSERTION"))
    kind, version, place = found.groups()
    if kind in _PUBLIC_DOMAIN:
        return f"{_PUBLIC_DOMAIN[kind]}-{version}"
    return "-".join(filter(None, ["CC", kind.upper(), version, (place or "").upper()]))
