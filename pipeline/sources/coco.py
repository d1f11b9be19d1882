"""COCO captions: an annotation file of the 2014 or 2017 layout and its image folder.

Every picture has its captions (five, mostly), its own licence and its address as credit; the
picture is its own group. A picture that the folder lacks becomes a sample without one, which
preprocessing quarantines.

    CocoSource("annotations/captions_val2017.json", "val2017", credits).samples()
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pipeline.contracts import Caption, Sample
from pipeline.errors import DataError
from pipeline.records import Credits
from pipeline.shards import open_uri
from pipeline.sources._files import EXTENSIONS, list_files, make_sample, read_all

_CREATIVE_COMMONS = re.compile(
    r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)/([\d.]+)(?:/([a-z]{2})\b)?"
)
_PUBLIC_DOMAIN = {"zero": "CC0", "mark": "CC-PDM"}


class CocoSource:
    """The pictures of a COCO captions file.

    Args:
        annotations: the JSON file, a path or URI.
        images: the folder its file names are in.
        credits: what the file does not say.

    Raises (from samples()):
        DataError: no such file or folder, no COCO captions, or none of the pictures is there.
    """

    def __init__(self, annotations: str, images: str, credits: Credits) -> None:
        self.annotations, self.images, self.credits = annotations, images, credits

    def samples(self) -> Iterator[Sample]:
        """By picture id."""
        entries, captions, licenses = self._read()
        fs, root = open_uri(self.images)
        there = set(list_files(fs, root))
        if there.isdisjoint(entry["file_name"] for entry in entries):
            raise DataError(
                f"none of the {len(entries)} pictures of {self.annotations} is in {self.images}; "
                f"the first is {entries[0]['file_name']}"
            )
        names = [e["file_name"] if e["file_name"] in there else None for e in entries]
        for entry, image in zip(entries, read_all(fs, root, names), strict=True):
            path = PurePosixPath(entry["file_name"])
            said = {
                "license": licenses.get(entry.get("license")),
                "attribution": entry.get("flickr_url") or entry.get("coco_url"),
            }
            yield make_sample(
                str(path.with_suffix("")),
                image,
                EXTENSIONS.get(path.suffix.lower(), "jpg"),
                captions.get(entry["id"], []),
                self.credits.fill(said, group=f"coco-{entry['id']}"),
            )

    def _read(self) -> tuple[list[dict[str, Any]], dict[Any, list[Caption]], dict[Any, str]]:
        """Pictures by id, captions by picture id, SPDX licences by licence id."""
        fs, path = open_uri(self.annotations)
        try:
            with fs.open_input_stream(path) as stream:
                content = json.loads(stream.read())
            entries = sorted(content["images"], key=lambda entry: entry["id"])
            captions: dict[Any, list[Caption]] = {}
            for note in sorted(content["annotations"], key=lambda note: note["id"]):
                if note["caption"].strip():
                    caption = Caption(note["caption"].strip(), self.credits.language)
                    captions.setdefault(note["image_id"], []).append(caption)
            names = {item["id"]: spdx(item) for item in content.get("licenses", ())}
            for entry in entries:
                PurePosixPath(entry["file_name"])
        except FileNotFoundError as error:
            raise DataError(f"there is no file {self.annotations}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{self.annotations} is no COCO captions file ({type(error).__name__}: {error}): "
                "it needs `images` with id and file_name, and `annotations` with id, image_id and "
                "caption"
            ) from error
        if not entries:
            raise DataError(f"{self.annotations} lists no pictures")
        return entries, captions, names


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
