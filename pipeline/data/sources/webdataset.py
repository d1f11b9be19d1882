"""Existing tars, img2dataset's included, read where they are: only a manifest is written.

The manifest counts and checks the tars; preprocessing takes captions and credits from KEY.json and
KEY.txt (pipeline/data/shards/records.py). With `rewrite` (--copy) the same samples become shards of
our own.

    source = WebDatasetSource(folder="s3://bucket/laion", license="NOASSERTION")
    write_index(source.index("shards/laion"), "shards/laion")
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from pipeline.contracts import Caption, LeftOut, OptionName, Positional, Sample
from pipeline.data.shards.captions import BadCaption
from pipeline.data.shards.files import CHUNK, open_patiently
from pipeline.data.shards.manifest import InPlace, Manifest, Shard, list_tars, open_uri
from pipeline.data.shards.records import Credits, read_record
from pipeline.data.shards.tally import NO_CAPTION, Tally, image_problem
from pipeline.data.shards.tars import IMAGE_EXTENSIONS, TarSample, read_samples
from pipeline.data.sources import CaptionedSource
from pipeline.data.sources._files import Folder, make_sample
from pipeline.errors import DataError

READ_AT_ONCE = 4  # tars


class _Hashing(io.RawIOBase):
    """Passes on the bytes of a stream, counts them and sums up their SHA-256."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        chunk = self.stream.read(size)
        self.sha256.update(chunk)
        self.size += len(chunk)
        return chunk


class WebDatasetSource(CaptionedSource):
    """The tars of a folder and the folders in it."""

    folder: Annotated[str, Positional()] = Field(
        min_length=1, description="A directory or URI with .tar files."
    )
    rewrite: Annotated[bool, OptionName("copy")] = Field(
        False, description="Copy the pictures into shards of Tessera's own."
    )

    def samples(self) -> Iterator[Sample | LeftOut]:
        """Tar by tar.

        Raises:
            DataError: there are no tars, or one is damaged.
        """
        seen: set[str] = set()
        folder, credits = Folder.at(self.folder), self.credits(self.folder)
        for name in _tars(folder):
            with open_patiently(folder.fs, f"{folder.root}/{name}") as stream:
                for found in read_samples(stream, name=name):
                    if found.key in seen and not found.problem:
                        found.problem = "duplicate_key"
                    seen.add(found.key)
                    yield from _outcomes(found, name, credits)

    def index(self, output: str) -> Manifest | None:
        """Count and check every tar; None with `rewrite`.

        A manifest that will lie beside the tars names them relatively, so that they may be moved
        together.

        Raises:
            DataError: there are no tars, one is damaged, no sample can be used, or their URI,
                which the manifest would name, has credentials in it.
        """
        if self.rewrite:
            return None
        folder, credits = Folder.at(self.folder), self.credits(self.folder)
        root = "." if same_folder(self.folder, output) else _address(folder)
        there = InPlace(root=root, **credits.model_dump())
        tally, shards = Tally(), []
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            counted = pool.map(lambda name: _count(folder, name, credits), _tars(folder))
            for shard, part in counted:
                shards.append(shard)
                tally.merge(part)
        tally.check()
        return Manifest.of(shards, tally, there)


SOURCE = WebDatasetSource


def _address(folder: Folder) -> str:
    """The folder as a manifest elsewhere can name it."""
    if "://" not in folder.address:
        return folder.root
    if "@" in urlsplit(folder.address).netloc:
        raise DataError(
            "the manifest names this URI, and there are credentials in it: leave them out, and "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or what the store reads, or --copy"
        )
    return folder.address


def _tars(folder: Folder) -> list[str]:
    names = list_tars(folder.fs, folder.root)
    if not names:
        raise DataError(f"there is no tar in {folder.address}: check the path or URI")
    return names


def _count(folder: Folder, name: str, credits: Credits) -> tuple[Shard, Tally]:
    """Read one tar to its end."""
    tally, samples = Tally(), 0
    with open_patiently(folder.fs, f"{folder.root}/{name}") as raw:
        stream: Any = _Hashing(raw)
        for found in read_samples(stream, name=name):
            samples += 1
            for outcome in _outcomes(found, name, credits):
                tally.add(outcome)
        while stream.read(CHUNK):
            pass
    if not samples:
        raise DataError(f"{name} in {folder.address} holds no samples (KEY.jpg, KEY.txt, KEY.json)")
    digest = stream.sha256.hexdigest()
    return Shard(file=name, samples=samples, bytes=stream.size, sha256=digest), tally


def _outcomes(found: TarSample, name: str, credits: Credits) -> Iterator[Sample | LeftOut]:
    """A sample of the tar called `name`, or why it cannot be used."""
    where = f"{name}: {found.key}"
    members = f"it has {', '.join(found.files) or 'nothing'}"
    if found.problem:
        yield LeftOut(found.problem, where)
        return
    try:
        record, left_out = read_record(found.key, found.files, credits)
    except BadCaption as error:
        yield LeftOut(error.reason, where)
        return
    if problem := image_problem(found.image):
        yield LeftOut(problem[0], f"{where}: {members if found.image is None else problem[1]}")
        return
    yield from (replace(item, example=f"{where}: {item.example}") for item in left_out)
    captions = [Caption(c["text"], c["language"]) for c in record.pop("captions")]
    if not captions:
        yield LeftOut(NO_CAPTION, f"{where}: {members}")
    extension = next(name for name in IMAGE_EXTENSIONS if name in found.files)
    yield make_sample(found.key, found.image or b"", extension, captions, record)


def same_folder(one: str, other: str) -> bool:
    """Whether two paths or URIs mean one folder."""
    (fs, path), (other_fs, other_path) = open_uri(one), open_uri(other)
    return bool(fs == other_fs) and path == other_path
