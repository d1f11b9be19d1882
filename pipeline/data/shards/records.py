"""A sample's record: its captions and credits, read from the names that data sets use for them.

Table rows, JSON objects and tar members are read alike: `caption`, `text` or `captions`,
`caption_zh` for a language, in any form that `read_captions` knows; `group`, `style`, `source`,
`license`, `attribution` (or `author`). What a record leaves out, the `Credits` of its source say.

    record, left_out = record_of("000000012", {"jpg": ..., "txt": b"a dog"}, credits)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.contracts import Caption, LeftOut
from pipeline.data.shards.captions import BadCaption
from pipeline.data.shards.tars import CAPTION_EXTENSIONS, LANGUAGE, Members

FIELDS = ("group", "style", "source", "license", "attribution")
_NO_CAPTION = r"(?!(?:id|ids|url|raw|old|len)$)"  # caption_id is a number, not Indonesian
_CAPTION_FIELD = re.compile(rf"^(?:captions?|text)(?:_{_NO_CAPTION}{LANGUAGE})?$")
_LANGUAGE = re.compile(rf"^{_NO_CAPTION}{LANGUAGE}$")
_TEXT_KEYS = ("text", "raw", "caption")
_CAPTION_FILE = re.compile(rf"^(?:{LANGUAGE}\.)?(?:{'|'.join(CAPTION_EXTENSIONS)})$")


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
        found = {name: text_of(said.get(name)) for name in FIELDS}
        found["attribution"] = found["attribution"] or text_of(said.get("author"))
        return {name: found[name] or known[name] for name in FIELDS}


def text_of(value: Any) -> str:
    """A text or whole number (the id of a group) as text; "" for anything else.

    pandas writes a column of whole numbers in which one is missing as floats.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_said = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value).strip() if is_said else ""


def captions_in(said: Mapping[str, Any], language: str) -> list[Caption | LeftOut]:
    """The captions of a row or JSON object, without blank ones, cleaned later (captions.py); and
    what stands where a caption should and is not understood.

    Args:
        language: BCP 47 tag of the captions that name none.
    """
    captions: list[Caption | LeftOut] = []
    own = text_of(said.get("language")) or language
    for name, value in said.items():
        match = _CAPTION_FIELD.match(str(name))
        if match is not None:
            captions += read_captions(value, tag(match["language"] or own), str(name))
    return captions


def lookup(said: Mapping[str, Any], name: str) -> Any:
    """A field of a row or object by its name, or by FIELD.NAME what is in it; None without one.

    >>> lookup({"meta": {"prompt": "a dog"}}, "meta.prompt")
    'a dog'
    """
    if name in said:
        return said[name]
    first, _, rest = name.partition(".")
    inner = said.get(first)
    return lookup(inner, rest) if rest and isinstance(inner, Mapping) else None


def tag(language: str) -> str:
    """A BCP 47 tag with hyphens: zh_CN -> zh-CN."""
    return language.replace("_", "-")


def read_captions(value: Any, language: str, name: str) -> Iterator[Caption | LeftOut]:
    """The captions that one field holds, whatever its form; nothing of one that is null or blank.

    A text; a {"text", "language"} object; one with the text as "raw", beside its tokens (COCO's
    sentences); one of texts by language ({"en": ..., "zh": ...}); or a list of these.

    Args:
        language: of the captions that name none.
        name: of the field, for messages.
    """
    if isinstance(value, str):
        if value.strip():
            yield Caption(value.strip(), language)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from read_captions(item, language, name)
    elif isinstance(value, Mapping):
        written = next((key for key in _TEXT_KEYS if key in value), None)
        if written is not None:
            own = text_of(value.get("language")) or language
            yield from read_captions(value[written], own, f"{name}.{written}")
        elif value and all(_LANGUAGE.match(str(key)) for key in value):
            for key, text in value.items():
                yield from read_captions(text, tag(str(key)), f"{name}.{key}")
        elif value:
            yield LeftOut("bad_caption", f"{name} holds {', '.join(map(str, value))}", "caption")
    elif value is not None and value == value:  # pandas writes nothing as NaN
        yield LeftOut("bad_caption", f"{name} holds {value!r:.40}", "caption")


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


def record_of(
    key: str, files: Mapping[str, bytes], credits: Credits, members: Members | None = None
) -> tuple[dict[str, Any], list[LeftOut]]:
    """The record of a sample in a tar that someone else wrote, from those of KEY.json, KEY.txt and
    KEY.zh.txt that there are, and the captions that are left out of it.

    Args:
        files: contents by extension.
        members: which of them are captions.

    Raises:
        BadCaption: bad_json; bad_utf8 of all captions; or failed_download (the status that
            img2dataset noted).
    """
    said = _parsed(files["json"]) if "json" in files else {}
    if said.get("status", "success") != "success":
        raise BadCaption("failed_download")
    found: list[Caption | LeftOut] = []
    if members is not None and members.captions:
        for name, language in members.captions.items():
            if name in files:
                found += _captions_of_file(name, files[name], language)
            elif name.startswith("json."):
                found += read_captions(lookup(said, name.removeprefix("json.")), language, name)
    else:
        for name, content in files.items():
            if match := _CAPTION_FILE.match(name):
                language = tag(match["language"] or credits.language)
                found += _captions_of_file(name, content, language)
        found += captions_in(said, credits.language)
    captions, left_out = parted(found)
    if not captions and any(item.reason == "bad_utf8" for item in left_out):
        raise BadCaption("bad_utf8")
    record = {
        "captions": [{"text": c.text, "language": c.language} for c in canonical(captions)],
        **credits.fill(said, group=text_of(said.get("url")) or key),
    }
    return record, left_out


def _captions_of_file(name: str, content: bytes, language: str) -> Iterator[Caption | LeftOut]:
    try:
        text = _decoded(content)
    except BadCaption as error:
        yield LeftOut(error.reason, name, "caption")
    else:
        yield from read_captions(text, language, name)


def parted(found: Iterable[Caption | LeftOut]) -> tuple[list[Caption], list[LeftOut]]:
    """Captions, and what is none."""
    captions: list[Caption] = []
    left_out: list[LeftOut] = []
    for item in found:
        if isinstance(item, Caption):
            captions.append(item)
        else:
            left_out.append(item)
    return captions, left_out


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
