"""Pictures without captions, for the tokenizer (preprocess.require_captions=false).

UnlabelledSource(folder="photos", license="CC0-1.0").samples()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from pipeline.contracts import LeftOut, Positional, Sample
from pipeline.data.sources import CreditedSource, FolderReader
from pipeline.data.sources._files import Folder, make_sample, unique_names


class UnlabelledSource(CreditedSource, FolderReader):
    """The images of a folder and the folders in it; they have no captions."""

    captioned: ClassVar[bool] = False

    folder: Annotated[str, Positional()] = Field(min_length=1, description="A directory or URI.")

    def samples(self) -> Iterator[Sample | LeftOut]:
        """By file name; then what is left out.

        Raises:
            DataError: there is no such folder, or there are no images in it.
        """
        folder, credits = Folder.at(self.folder), self.credits(self.folder)
        listing = folder.listing(follow_links=self.follow_links)
        images = listing.images()
        keys = unique_names(images)
        contents = folder.contents(image.name for image in images)
        for image, content in zip(images, contents, strict=True):
            fields = credits.fill({}, group=image.stem)
            yield make_sample(keys[image.name], content, image.extension, (), fields)
        yield from listing.unread(keys)


SOURCE = UnlabelledSource
