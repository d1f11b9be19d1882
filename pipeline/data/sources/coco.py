"""A COCO captions file of the 2014 or 2017 layout; licences are the file's own.

Every image has its captions (five, mostly), its own licence and its address as credit, and is its
own group. An image that is listed twice is one sample with all captions. What an entry lacks costs
that entry.

    CocoSource(annotations="annotations/captions_val2017.json", images="val2017").samples()
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field

from pipeline.contracts import Caption, LeftOut, Positional, Sample
from pipeline.data.shards.manifest import open_uri
from pipeline.data.shards.records import text_of
from pipeline.data.sources import CaptionedSource, FolderReader
from pipeline.data.sources._files import EXTENSIONS, Folder, make_sample
from pipeline.errors import DataError

_CREATIVE_COMMONS = re.compile(
    r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)/([\d.]+)(?:/([a-z]{2})\b)?"
)
_PUBLIC_DOMAIN = {"zero": "CC0", "mark": "CC-PDM"}


class CocoSource(CaptionedSource, FolderReader):
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

    def samples(self) -> Iterator[Sample | LeftOut]:
        """By image id; then what is left out.

        Raises:
            DataError: there is no such file or folder, the file has no COCO captions, or the folder
                has none of its images.
        """
        content = self._read()
        folder, credits = Folder.at(self.images), self.credits(self.annotations)
        listing = folder.listing(follow_links=self.follow_links)
        names = {entry.file_name: listing.find(entry.file_name) for entry in content.entries}
        found = [entry for entry in content.entries if names[entry.file_name] is not None]
        if not found:
            raise DataError(
                f"none of the {len(content.entries)} pictures of {self.annotations} is in "
                f"{self.images}; the first is {content.entries[0].file_name}"
            )
        contents = folder.contents(names[entry.file_name] for entry in found)
        for entry, image in zip(found, contents, strict=True):
            path = PurePosixPath(entry.file_name)
            said = {
                "license": content.licenses.get(text_of(entry.said.get("license"))),
                "attribution": entry.said.get("flickr_url") or entry.said.get("coco_url"),
            }
            yield make_sample(
                str(path.with_suffix("")),
                image,
                EXTENSIONS.get(path.suffix.lower(), "jpg"),
                entry.captions,
                credits.fill(said, group=f"coco-{entry.id}"),
            )
        for entry in content.entries:
            if names[entry.file_name] is None:
                yield listing.absent(entry.file_name, f"image {entry.id}")
        yield from content.left_out
        yield from listing.left_out

    def _read(self) -> _Content:
        fs, path = open_uri(self.annotations)
        try:
            with fs.open_input_stream(path) as stream:
                content = _parsed(json.loads(stream.read()), self.language)
        except FileNotFoundError as error:
            raise DataError(f"there is no file {self.annotations}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{self.annotations} is no COCO captions file ({type(error).__name__}: {error}): "
                "it needs `images` with id and file_name, and `annotations` with image_id and "
                "caption"
            ) from error
        if not content.entries:
            raise DataError(f"{self.annotations} lists no pictures")
        return content


SOURCE = CocoSource


@dataclass(frozen=True)
class _Entry:
    """An image that a captions file lists, under one id or several.

    Attributes:
        id: the first one.
        said: everything that the file says of it.
        captions: in the file's order.
    """

    id: str
    file_name: str
    said: Mapping[str, Any]
    captions: list[Caption] = field(default_factory=list)


@dataclass(frozen=True)
class _Content:
    """What a captions file says.

    Attributes:
        entries: its images, by their id.
        licenses: SPDX identifiers, by licence id.
        left_out: entries and annotations that lack what they need.
    """

    entries: list[_Entry]
    licenses: dict[str, str]
    left_out: list[LeftOut]


def _parsed(content: Any, language: str) -> _Content:
    """Raises KeyError, TypeError or ValueError where the layout is another.

    Ids are compared as text: some writers put "7" into the annotations for an image 7.
    """
    entries: dict[str, _Entry] = {}  # by file name
    by_id: dict[str, _Entry] = {}
    left_out: list[LeftOut] = []
    for number, said in enumerate(_in_order(content["images"])):
        image = said if isinstance(said, dict) else {}
        name, id = image.get("file_name"), text_of(image.get("id"))
        if not isinstance(name, str) or not name or not id:
            left_out.append(LeftOut("bad_entry", f"images, entry {number}: {_described(said)}"))
            continue
        by_id[id] = entries.setdefault(name, _Entry(id, name, image))
    for number, said in enumerate(_in_order(content["annotations"])):
        note = said if isinstance(said, dict) else {}
        where = f"annotation {text_of(note.get('id')) or f'number {number}'}"
        entry = by_id.get(text_of(note.get("image_id")))
        text = note.get("caption")
        if not isinstance(text, str) or not text.strip():
            held = f"the caption {text!r:.40}" if "caption" in note else _described(said)
            left_out.append(LeftOut("bad_caption", f"{where} has {held}", "caption"))
        elif entry is None:
            of = f"of the image {note.get('image_id')!r:.40}, which is not listed"
            left_out.append(LeftOut("bad_entry", f"{where} is {of}", "caption"))
        else:
            entry.captions.append(Caption(text.strip(), language))
    licenses = {text_of(x["id"]): spdx(x) for x in content.get("licenses") or () if "id" in x}
    return _Content(list(entries.values()), licenses, left_out)


def _in_order(items: Any) -> list[Any]:
    """By id, if all have a number as id; else as they stand.

    Raises:
        TypeError: it is no list.
    """
    if not isinstance(items, list):
        raise TypeError(f"a list is expected, and there is {type(items).__name__}")
    if all(isinstance(item, dict) and isinstance(item.get("id"), int) for item in items):
        return sorted(items, key=lambda item: item["id"])
    return items


def _described(item: object) -> str:
    """What an entry holds, in few words."""
    return ", ".join(map(str, item)) if isinstance(item, dict) else repr(item)[:40]


def spdx(license: dict[str, Any]) -> str:
    """A COCO licence -> its SPDX identifier, else its name.

    >>> spdx({"id": 1, "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "name": "..."})
    'CC-BY-NC-SA-2.0'
    """
    found = _CREATIVE_COMMONS.search(str(license.get("url") or ""))
    if found is None:
        return str(license.get("name") or "NOASSERTION")
    kind, version, place = found.groups()
    if kind in _PUBLIC_DOMAIN:
        return f"{_PUBLIC_DOMAIN[kind]}-{version}"
    return "-".join(filter(None, ["CC", kind.upper(), version, (place or "").upper()]))
