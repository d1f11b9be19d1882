"""Pictures without captions, to train the image tokenizer on.

Preprocess them with `preprocess.require_captions=false`.

    UnlabelledSource("photos", Credits(style="photo", source="mine", license="CC0-1.0")).samples()
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.contracts import Sample
from pipeline.records import Credits
from pipeline.shards import open_uri
from pipeline.sources._files import list_files, make_sample, pictures_of, read_all, unique_names


class UnlabelledSource:
    """The pictures of a folder and the folders in it; their captions are empty.

    Args:
        folder: a path or URI.
        credits: what is true of all of them.

    Raises (from samples()):
        DataError: no such folder, or no pictures in it.
    """

    def __init__(self, folder: str, credits: Credits) -> None:
        self.folder, self.credits = folder, credits

    def samples(self) -> Iterator[Sample]:
        """By file name."""
        fs, root = open_uri(self.folder)
        pictures = pictures_of(list_files(fs, root), self.folder)
        keys = unique_names(pictures)
        contents = read_all(fs, root, [picture.name for picture in pictures])
        for picture, image in zip(pictures, contents, strict=True):
            texts = self.credits.fill({}, group=picture.stem)
            yield make_sample(keys[picture.name], image, picture.extension, (), texts)
