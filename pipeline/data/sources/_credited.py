"""The settings of sources whose images share a licence, an origin and a credit.

class FolderSource(CaptionedSource): ...
FolderSource(folder="photos/cats", license="CC0-1.0").credits("photos/cats").source      # "cats"
"""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field

from pipeline.contracts import Source
from pipeline.data.shards.records import Credits


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


def last_part(path: str) -> str:
    """The name of a folder or file; of a URI neither its credentials nor its options.

    >>> last_part("photos/cats/"), last_part("s3://key:secret@bucket/laion?region=eu-west-1")
    ('cats', 'laion')
    """
    parts = urlsplit(path) if "://" in path else None
    place = path if parts is None else f"{parts.hostname or ''}{parts.path}"
    return place.rstrip("/").rpartition("/")[2] or place
