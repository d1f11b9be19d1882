"""Image files of a folder, on any file system that PyArrow knows.

folder = Folder.at("s3://bucket/cats")
for image in folder.listing().images():
    print(image.name, image.stem)       # "tabby/1.jpg", "tabby/1"
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pyarrow.fs

from pipeline.contracts import Caption, LeftOut, Sample
from pipeline.data.shards.manifest import open_uri, unreachable
from pipeline.data.shards.records import canonical, plain_key
from pipeline.data.shards.tally import NO_PICTURE
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

    def listing(self, *, follow_links: bool = False) -> Listing:
        """Every file below the folder; hidden files are left out.

        Args:
            follow_links: read symbolic links that lead out of the folder, too.

        Raises:
            DataError: there is no such folder, its file system does not answer, or there is no file
                that can be read.
        """
        try:
            if isinstance(self.fs, pyarrow.fs.LocalFileSystem):
                return _list_local(self.root, follow_links)
            found = self.fs.get_file_info(pyarrow.fs.FileSelector(self.root, recursive=True))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"there is no folder {self.root}: check the path or URI") from error
        except OSError as error:
            raise unreachable(self.root, error) from error
        prefix = self.root.rstrip("/") + "/"
        names = (i.path.removeprefix(prefix) for i in found if i.type == pyarrow.fs.FileType.File)
        return Listing(self.root, tuple(sorted(filter(_is_shown, names))))

    def contents(self, names: Iterable[str | None]) -> Iterator[bytes]:
        """Contents of the files in the order of the names, READ_AHEAD at a time; b"" for None and
        for a file that is gone or may not be read."""
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
        try:
            with self.fs.open_input_stream(f"{self.root}/{name}", compression=None) as stream:
                content: bytes = stream.read()
        except (FileNotFoundError, PermissionError) as error:
            LOG.warning("%s/%s: %s", self.root, name, error)
            return b""
        return content


@dataclass(frozen=True)
class Listing:
    """The files of a folder and of the folders in it.

    Attributes:
        root: the folder's path on its file system.
        names: paths below it, sorted.
        left_out: files that are not read: links out of the folder, names that are not UTF-8.
    """

    root: str
    names: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    @cached_property
    def there(self) -> frozenset[str]:
        """The names, to look one up."""
        return frozenset(self.names)

    def images(self) -> list[ImageFile]:
        """The images of formats that are read.

        Raises:
            DataError: there is none.
        """
        images = [ImageFile(n) for n in self.names if _suffix(n) in EXTENSIONS]
        if not images:
            suffixes = dict(Counter(map(_suffix, self.names)))
            links = f"; {len(self.left_out)} left out: " if self.left_out else ""
            links += self.left_out[0].example if self.left_out else ""
            raise DataError(
                f"{self.root} holds no .png, .jpg or .webp: it has {suffixes or 'nothing'}{links}"
            )
        return images

    def unread(self, read: Collection[str]) -> Iterator[LeftOut]:
        """What is left out of the folder if the files `read` are read."""
        yield from self.left_out
        for name in self.names:
            if _suffix(name) in _OTHER_IMAGES:
                yield LeftOut("other_format", name)
            elif name not in read:
                yield LeftOut("not_read", name, "file")

    def find(self, said: str, beside: str = "") -> str | None:
        """The file that a path written in a data set means; None if it is not in the folder.

        A path may start at the folder of the file that names it, at the data set's folder, or
        further up: metadata of the folder "train" may say "train/1.png". Nothing outside the
        folder is ever found, whatever the path says, since only listed names are looked up.

        Args:
            said: the path.
            beside: the folder, below the data set's, of the file that names it.
        """
        said = _plain(said)
        base = posixpath.join(self.root, beside).rstrip("/")
        places = base.split("/")
        starts = ["/".join(places[-count:]) + "/" for count in range(1, len(places) + 1)]
        below = [said.removeprefix(start) for start in starts if said.startswith(start)]
        tried = [posixpath.join(beside, said), said, *(posixpath.join(beside, n) for n in below)]
        if said.startswith(self.root + "/"):
            tried.append(said.removeprefix(self.root + "/"))
        return next((name for name in map(posixpath.normpath, tried) if name in self.there), None)

    def absent(self, said: str, where: str) -> LeftOut:
        """Why there is no image at a path that `find` does not find.

        Args:
            where: what names the path, for the example.
        """
        if is_url(said):
            return LeftOut("url", f"{where} names {said}")
        plain = _plain(said)
        if plain.startswith("..") or (plain.startswith("/") and not plain.startswith(self.root)):
            return LeftOut("outside_folder", f"{where} names {said}")
        return LeftOut(NO_PICTURE, f"{where} names {said}, which is not there")


def _plain(path: str) -> str:
    """A path as it is written in a data set, with slashes and without detours."""
    return posixpath.normpath(path.strip().replace("\\", "/"))


def is_url(text: str) -> bool:
    """Whether a text is an address, and no path."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", text.strip(), re.IGNORECASE) is not None


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_shown(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _list_local(root: str, follow_links: bool) -> Listing:
    """The files below a local folder. A link to a folder in `root` is passed over, since its files
    are listed where they are: so no loop of links is walked through.

    Raises:
        OSError: a folder cannot be listed.
    """
    names: list[str] = []
    left_out: list[LeftOut] = []
    top = Path(os.path.realpath(root))
    walked = {top}

    def leave_out(reason: str, name: str, example: str) -> None:
        is_image = _suffix(name) in {*EXTENSIONS, *_OTHER_IMAGES}
        left_out.append(LeftOut(reason, example, "image" if is_image else "file"))

    def walk(folder: str, below: str) -> None:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = below + entry.name
            target = Path(os.path.realpath(entry.path)) if entry.is_symlink() else None
            is_inside = target is None or target.is_relative_to(top)
            if entry.name.startswith("."):
                continue
            if not _is_utf8(name):
                leave_out("bad_name", name, name)
            elif not (is_inside or follow_links) or not (entry.is_dir() or entry.is_file()):
                leave_out("link", name, f"{name} -> {target or 'no file'}")
            elif entry.is_file():
                names.append(name)
            elif target is None or not (is_inside or target in walked):
                walked.add(target or top)
                walk(entry.path, f"{name}/")

    walk(root, "")
    return Listing(root, tuple(sorted(names)), tuple(left_out))


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


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
