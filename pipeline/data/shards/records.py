"""A sample's record: its captions and credits, read from the names that data sets use for them.

Table rows, JSON objects and tar members are read alike: `caption`, `text` or `captions`,
`caption_zh` for a language, `group`, `style`, `source`, `license`, `attribution` (or `author`).
What a record leaves out, the `Credits` of its source say.

    record_of("000000012", {"jpg": ..., "txt": b"a dog"}, credits)["captions"]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.contracts import Caption
from pipeline.data.shards.captions import BadCaption

FIELDS = ("group", "style", "source", "license", "attribution")
LANGUAGE = r"(?P<language>[A-Za-z]{2,3}(?:[-_]\w+)*)"
"""Matches a BCP 47 tag, written with hyphens or underscores."""
_NO_CAPTION = r"(?!(?:id|ids|url|raw|old|len)$)"  # caption_id is a number, not Indonesian
_CAPTION_FIELD = re.compile(rf"^(?:captions?|text)(?:_{_NO_CAPTION}{LANGUAGE})?$")
_CAPTION_FILE = re.compile(rf"^(?:{LANGUAGE}\.)?txt$")


class Credits(BaseModel):
    """What is true of those samples of a source that do not say otherwise themselves.

    Attributes:
        style: who made the images, or in which manner.
        source: where they come from.
        license: SPDX identifier; NOASSERTION if it is unknown.
        attribution: the credit that the licence asks for.
        language: BCP 47 tag of the captions that name none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    style: str = Field(min_length=1)
    source: str = Field(min_length=1)
    license: str = Field(min_length=1)
    attribution: str = ""
    language: str = Field("en", min_length=2)

    def fill(self, said: Mapping[str, Any], *, group: str) -> dict[str, str]:
        """The text of each of FIELDS: what a record says, else these credits and `group`."""
        known = {"group": group, **self.model_dump(include=set(FIELDS))}
        found = {name: _text(said.get(name)) for name in FIELDS}
        found["attribution"] = found["attribution"] or _text(said.get("author"))
        return {name: found[name] or known[name] for name in FIELDS}


def _text(value: Any) -> str:
    """A text or whole number (the id of a group) as text; "" for anything else.

    pandas writes a column of whole numbers in which one is missing as floats.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_said = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value).strip() if is_said else ""


def captions_in(said: Mapping[str, Any], language: str) -> list[Caption]:
    """The captions of a row or JSON object, without blank ones, cleaned later (captions.py).

    Args:
        language: BCP 47 tag of the captions that name none.
    """
    captions: list[Caption] = []
    own = _text(said.get("language")) or language
    for name, value in said.items():
        match = _CAPTION_FIELD.match(str(name))
        if match is not None:
            captions += _captions(value, tag(match["language"] or own))
    return captions


def tag(language: str) -> str:
    """A BCP 47 tag with hyphens: zh_CN -> zh-CN."""
    return language.replace("_", "-")


def _captions(value: Any, language: str) -> Iterator[Caption]:
    """A text, a {"text", "language"} object, or a list of either."""
    if isinstance(value, str) and value.strip():
        yield Caption(value.strip(), language)
    elif isinstance(value, Mapping):
        yield from _captions(value.get("text"), str(value.get("language") or language))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _captions(item, language)


def canonical(captions: Iterable[Caption]) -> tuple[Caption, ...]:
    """Each caption once, grouped by language, the shortest of a language first."""
    by_language: dict[str, list[Caption]] = {}
    for caption in dict.fromkeys(captions):
        by_language.setdefault(caption.language, []).append(caption)
    ordered: list[Caption] = []
    for those in by_language.values():
        shortest = min(those, key=lambda caption: len(caption.text))
        ordered += [shortest, *(caption for caption in those if caption is not shortest)]
    return tuple(ordered)


def record_of(key: str, files: Mapping[str, bytes], credits: Credits) -> dict[str, Any]:
    """The record of a sample in a tar that someone else wrote, from those of KEY.json, KEY.txt and
    KEY.zh.txt that there are.

    Args:
        files: contents by extension.

    Raises:
        BadCaption: bad_json, bad_utf8, or failed_download (the status that img2dataset noted).
    """
    said = _parsed(files["json"]) if "json" in files else {}
    if said.get("status", "success") != "success":
        raise BadCaption("failed_download")
    captions: list[Caption] = []
    for name, content in files.items():
        match = _CAPTION_FILE.match(name)
        if match is not None:
            captions += _captions(_decoded(content), tag(match["language"] or credits.language))
    captions += captions_in(said, credits.language)
    return {
        "captions": [{"text": c.text, "language": c.language} for c in canonical(captions)],
        **credits.fill(said, group=_text(said.get("url")) or key),
    }


def _parsed(encoded: bytes) -> dict[str, Any]:
    text = _decoded(encoded)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise BadCaption("bad_json") from error
    if not isinstance(said, dict):
        raise BadCaption("bad_json")
    return said


def _decoded(encoded: bytes) -> str:
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadCaption("bad_utf8") from error


def plain_key(text: str) -> str:
    """A file name as a sample key: letters, digits, "-" and "_"; a hash keeps changed names apart.

    >>> plain_key("img_0001"), plain_key("cats/tom 1")
    ('img_0001', 'cats-tom-1-d4b76fe1')
    >>> plain_key("红苹果")  # of which the hash alone is left
    '57e697cba4ba94a6'
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    if plain == text:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    kept = plain.strip("-")[:80]
    return f"{kept}-{digest[:8]}" if kept else digest[:16]
