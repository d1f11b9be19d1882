"""Captions, checked in one place: what a caption may be, and why one is refused.

Use:

    captions, left_out = captions_of([{"text": "red apple", "language": "en"}], max_chars=1_000)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from pipeline.contracts import Caption


class BadCaption(ValueError):  # noqa: N818 - says why one row is left out; the program goes on
    """A caption that cannot be used.

    Attributes:
        reason: bad_json, bad_utf8, empty_caption, long_caption, other_language or
            failed_download.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def clean(text: str) -> str:
    """The text NFC-normalised, white space and control characters collapsed to single spaces."""
    spaced = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(unicodedata.normalize("NFC", spaced).split())


def captions_of(raw: Any, max_chars: int) -> tuple[tuple[Caption, ...], tuple[str, ...]]:
    """The captions of a parsed JSON list of {"text", "language"} objects, cleaned.

    A caption that cannot be used costs itself, as long as there is another.

    Args:
        max_chars: length of the longest caption allowed, in characters.

    Returns:
        The captions that can be used, and the reason of each other one.

    Raises:
        BadCaption: it is no such list, it is empty, or each caption is malformed, empty, too long
            or not Unicode; the reason is the first one's.
    """
    if not isinstance(raw, list):
        raise BadCaption("bad_json")
    captions, left_out = [], []
    for item in raw:
        try:
            captions.append(_caption(item, max_chars))
        except BadCaption as error:
            left_out.append(error.reason)
    if not captions:
        raise BadCaption(left_out[0] if left_out else "empty_caption")
    return tuple(captions), tuple(left_out)


def speaks(language: str, wanted: Sequence[str]) -> bool:
    """Whether a BCP 47 tag is one of those wanted, or narrower than one (zh-Hant than zh).

    >>> speaks("zh-Hant", ["en", "zh"]), speaks("zho", ["zh"])
    (True, False)
    """
    tag = language.lower()
    return any(tag == w.lower() or tag.startswith(f"{w.lower()}-") for w in wanted)


def _caption(item: Any, max_chars: int) -> Caption:
    if not isinstance(item, dict):
        raise BadCaption("bad_json")
    text, language = item.get("text"), item.get("language")
    if not isinstance(text, str) or not isinstance(language, str) or not language:
        raise BadCaption("bad_json")
    if any("\ud800" <= c <= "\udfff" for c in text + language):  # JSON's \ud83d without its half
        raise BadCaption("bad_utf8")
    text = clean(text)
    if not text:
        raise BadCaption("empty_caption")
    if len(text) > max_chars:
        raise BadCaption("long_caption")
    return Caption(text=text, language=language)


def with_tags(label: str, tags: Sequence[str], language: str) -> tuple[Caption, ...]:
    """Two captions: the label, and the label with its tags in brackets, punctuated by language.

    >>> [c.text for c in with_tags("red apple", ["apple", "fruit"], "en")]
    ['red apple', 'red apple (apple, fruit)']
    """
    label = clean(label)
    others = [tag for tag in map(clean, tags) if tag and tag != label]
    if not others:
        return (Caption(label, language),)
    chinese = language.partition("-")[0] in {"zh", "ja"}
    listed = f"（{'、'.join(others)}）" if chinese else f" ({', '.join(others)})"
    return Caption(label, language), Caption(label + listed, language)
