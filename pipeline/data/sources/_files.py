"""Image files of a folder, on any file system that PyArrow knows.

folder = Folder.at("s3://bucket/cats")
for image in folder.images(folder.names()):
    print(image.name, image.stem)       # "tabby/1.jpg", "tabby/1"
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow.fs

from pipeline.contracts import Caption, Sample
from pipeline.data.shards.manifest import open_uri, unreachable
from pipeline.data.shards.records import canonical, plain_key
from pipeline.errors import DataError

LOG = logging.getLogger(__name__)
EXTENSIONS = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
_OTHER_IMAGES = {".gif", ".bmp", ".tif", ".tiff", ".svg", ".heic", ".avif", ".jxl"}
READ_AHEAD = 64  # files fetched beside each other


@dataclass(frozen=True)
class ImageFile:
    """An image below a folder.

    Attributes:
        name: path below the folder.
    """

    name: str

    @property
    def stem(self) -> str:
        """The name without its extension: what caption files beside it are called."""
        return str(PurePosixPath(self.name).with_suffix(""))

    @property
    def extension(self) -> str:
        """The extension that its sample has: "jpg" for .JPEG."""
        return EXTENSIONS[PurePosixPath(self.name).suffix.lower()]


@dataclass(frozen=True)
class Folder:
    """A folder and the folders in it.

    Attributes:
        address: the path or URI that it was opened with.
        fs: the file system that it lies on.
        root: its path there.
    """

    address: str
    fs: pyarrow.fs.FileSystem
    root: str

    @classmethod
    def at(cls, address: str) -> Folder:
        """The folder at a path or URI.

        Raises:
            DataError: a URI that PyArrow does not read.
        """
        return cls(address, *open_uri(address))

    def names(self) -> list[str]:
        """The path of every file below the folder, sorted; hidden files are left out.

        Raises:
            DataError: there is no such folder, or its file system does not answer.
        """
        try:
            found = self.fs.get_file_info(pyarrow.fs.FileSelector(self.root, recursive=True))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"there is no folder {self.root}: check the path or URI") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"a file in {self.root} has a name that is not UTF-8: rename it"
            ) from error
        except OSError as error:
            raise unreachable(self.root, error) from error
        prefix = self.root.rstrip("/") + "/"
        names = (i.path.removeprefix(prefix) for i in found if i.type == pyarrow.fs.FileType.File)
        return sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))

    def images(self, names: Iterable[str]) -> list[ImageFile]:
        """The images among file names; those of formats that are not read are counted in the log.

        Raises:
            DataError: there is none.
        """
        names = list(names)
        suffixes = Counter(PurePosixPath(name).suffix.lower() for name in names)
        others = {suffix: suffixes[suffix] for suffix in sorted(_OTHER_IMAGES & suffixes.keys())}
        if others:
            LOG.warning("%s: left aside, no PNG, JPEG or WebP: %s", self.address, others)
        images = [ImageFile(n) for n in names if PurePosixPath(n).suffix.lower() in EXTENSIONS]
        if not images:
            raise DataError(
                f"{self.address} holds no .png, .jpg or .webp: it has {dict(suffixes) or 'nothing'}"
            )
        return images

    def contents(self, names: Iterable[str | None]) -> Iterator[bytes]:
        """Contents of the files in the order of the names, READ_AHEAD at a time; b"" for None."""
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            window: list[str | None] = []
            for name in names:
                window.append(name)
                if len(window) == READ_AHEAD:
                    yield from pool.map(self._read, window)
                    window = []
            yield from pool.map(self._read, window)

    def _read(self, name: str | None) -> bytes:
        if name is None:
            return b""
        with self.fs.open_input_stream(f"{self.root}/{name}", compression=None) as stream:
            content: bytes = stream.read()
        return content


def make_sample(
    key: str,
    image: bytes,
    extension: str,
    captions: Iterable[Caption],
    fields: dict[str, str],
) -> Sample:
    """A Sample under a plain key; `fields` as `Credits.fill` gives them."""
    return Sample(
        key=plain_key(key),
        image=image,
        extension=extension,
        captions=canonical(captions),
        **fields,
    )


def unique_names(images: Iterable[ImageFile]) -> dict[str, str]:
    """By file name what to make a key of: the stem, or the name where two images share a stem."""
    images = list(images)
    stems = Counter(image.stem for image in images)
    return {image.name: image.stem if stems[image.stem] == 1 else image.name for image in images}
