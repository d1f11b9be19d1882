"""The settings of sources whose images share a licence, an origin and a credit.

class FolderSource(CaptionedSource): ...
FolderSource(folder="photos/cats", license="CC0-1.0").credits("photos/cats").source      # "cats"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from pipeline.contracts import Caption, LeftOut, OptionName, Source
from pipeline.data.shards.records import Credits, captions_in, lookup, read_captions


class CreditedSource(Source):
    """A source that says of all its images what they do not say of themselves."""

    license: str = Field(
        min_length=1,
        description="Licence of the images that name none, as an SPDX identifier such as "
        "CC-BY-4.0; NOASSERTION if it is unknown.",
    )
    style: str = Field(
        "photo",
        min_length=1,
        description="Style of the images that name none: who made them, or in which manner.",
    )
    source: str | None = Field(
        None, description="Where the images come from. Default: the last part of the path."
    )
    attribution: str = Field(
        "", description="Credit that the licence asks for, for the images that name none."
    )

    def credits(self, path: str) -> Credits:
        """What is true of all images below `path`, a path or URI, unless they say otherwise."""
        said = self.model_dump(include=set(Credits.model_fields))
        return Credits(**said | {"source": self.source or last_part(path)})


class CaptionedSource(CreditedSource):
    """A credited source whose images have captions."""

    language: str = Field(
        "en",
        min_length=2,
        description="Language of the captions that name none, as a BCP 47 tag such as en or zh.",
    )


class FolderReader(Source):
    """A source that reads files of a folder."""

    follow_links: bool = Field(
        False,
        description="Read symbolic links that lead out of the folder too, as in Hugging Face's "
        "cache.",
    )


class ColumnSource(CaptionedSource, FolderReader):
    """A captioned source whose images and captions are in fields with names."""

    image: str | None = Field(None, description="The field that holds or names the pictures.")
    captions: Annotated[tuple[str, ...], OptionName("caption")] = Field(
        (),
        description="A field that holds captions, with its language if it is not --language: text, "
        "or text_zh:zh; FIELD.NAME for what is in an object; may be repeated. Default: every field "
        "with a name like caption, text or caption_zh.",
    )

    def caption_fields(self) -> dict[str, str]:
        """The language of each field that is named."""
        fields = [caption.partition(":") for caption in self.captions]
        return {name: language or self.language for name, _, language in fields}

    def captions_in(self, row: Mapping[str, Any]) -> list[Caption | LeftOut]:
        """The captions of a row, of the fields that are named or of all that are called so."""
        if not self.captions:
            return captions_in(row, self.language)
        return [
            caption
            for name, language in self.caption_fields().items()
            for caption in read_captions(lookup(row, name), language, name)
        ]


def last_part(path: str) -> str:
    """The name of a folder or file; of a URI neither its credentials nor its options.

    >>> last_part("photos/cats/"), last_part("s3://key:secret@bucket/laion?region=eu-west-1")
    ('cats', 'laion')
    """
    parts = urlsplit(path) if "://" in path else None
    place = path if parts is None else f"{parts.hostname or ''}{parts.path}"
    return place.rstrip("/").rpartition("/")[2] or place
