"""Picture files of a folder, on any file system pyarrow knows.

for picture in list_images(*open_uri("s3://bucket/cats")):
    print(picture.name, picture.stem)       # "tabby/1.jpg", "tabby/1"
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
from pipeline.errors import DataError
from pipeline.records import canonical, plain_key
from pipeline.shards import unreachable

LOG = logging.getLogger(__name__)
EXTENSIONS = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
_OTHER_PICTURES = {".gif", ".bmp", ".tif", ".tiff", ".svg", ".heic", ".avif", ".jxl"}
READ_AHEAD = 64  # pictures fetched beside each other


@dataclass(frozen=True)
class ImageFile:
    """A picture below a folder.

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
        return EXTENSIONS[PurePosixPath(self.name).suffix.lower()]


def list_files(fs: pyarrow.fs.FileSystem, root: str) -> list[str]:
    """Names below root of every file, folders within it included, sorted; hidden ones are not.

    Raises:
        DataError: there is no such folder, or what it is on does not answer.
    """
    try:
        found = fs.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no folder {root}: check the path or URI") from error
    except UnicodeDecodeError as error:
        raise DataError(f"a file in {root} has a name that is not UTF-8: rename it") from error
    except OSError as error:
        raise unreachable(root, error) from error
    prefix = root.rstrip("/") + "/"
    names = (i.path.removeprefix(prefix) for i in found if i.type == pyarrow.fs.FileType.File)
    return sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))


def pictures_of(names: Iterable[str], where: str) -> list[ImageFile]:
    """The pictures among file names; what is a picture of another format is counted in the log.

    Raises:
        DataError: there is none.
    """
    names = list(names)
    suffixes = Counter(PurePosixPath(name).suffix.lower() for name in names)
    others = {suffix: suffixes[suffix] for suffix in sorted(_OTHER_PICTURES & suffixes.keys())}
    if others:
        LOG.warning("%s: left aside, no PNG, JPEG or WebP: %s", where, others)
    pictures = [ImageFile(n) for n in names if PurePosixPath(n).suffix.lower() in EXTENSIONS]
    if not pictures:
        raise DataError(
            f"{where} holds no .png, .jpg or .webp: it has {dict(suffixes) or 'nothing'}"
        )
    return pictures


def read_all(fs: pyarrow.fs.FileSystem, root: str, names: Iterable[str | None]) -> Iterator[bytes]:
    """Contents in the order of the names, fetched READ_AHEAD at a time; b"" for None."""

    def read(name: str | None) -> bytes:
        if name is None:
            return b""
        with fs.open_input_stream(f"{root}/{name}", compression=None) as stream:
            content: bytes = stream.read()
        return content

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        window: list[str | None] = []
        for name in names:
            window.append(name)
            if len(window) == READ_AHEAD:
                yield from pool.map(read, window)
                window = []
        yield from pool.map(read, window)


def make_sample(
    key: str,
    image: bytes,
    extension: str,
    captions: Iterable[Caption],
    texts: dict[str, str],
) -> Sample:
    """A Sample under a plain key; `texts` as `Credits.fill` gives them."""
    return Sample(
        key=plain_key(key),
        image=image,
        extension=extension,
        captions=canonical(captions),
        **texts,
    )


def unique_names(pictures: Iterable[ImageFile]) -> dict[str, str]:
    """A key's text by picture name: the stem, or the whole name where two pictures share a stem."""
    pictures = list(pictures)
    stems = Counter(picture.stem for picture in pictures)
    return {p.name: p.stem if stems[p.stem] == 1 else p.name for p in pictures}
