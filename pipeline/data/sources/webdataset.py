"""Existing tars, img2dataset's included, read where they are: only a manifest is written.

The manifest counts and checks the tars; preprocessing takes captions and credits from KEY.json and
KEY.txt (pipeline/data/shards/records.py). Where keys start again in every tar, the tar's name goes
before them. With `rewrite` (--copy) the same samples become shards of our own.

    source = WebDatasetSource(folder="s3://bucket/laion", license="NOASSERTION")
    write_index(source.index("shards/laion"), "shards/laion")
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from pipeline.contracts import Caption, LeftOut, OptionName, Positional, Sample
from pipeline.data.shards.captions import BadCaption
from pipeline.data.shards.files import CHUNK, open_patiently
from pipeline.data.shards.manifest import InPlace, Manifest, Shard, key_prefix, open_uri
from pipeline.data.shards.records import Credits, record_of
from pipeline.data.shards.tally import NO_CAPTION, Tally, image_problem
from pipeline.data.shards.tars import (
    IMAGE_EXTENSIONS,
    TAR_SUFFIXES,
    Members,
    TarSample,
    read_samples,
)
from pipeline.data.sources import ColumnSource
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


class WebDatasetSource(ColumnSource):
    """The tars of a folder and the folders in it."""

    folder: Annotated[str, Positional()] = Field(
        min_length=1, description="A directory or URI with .tar files."
    )
    rewrite: Annotated[bool, OptionName("copy")] = Field(
        False, description="Copy the pictures into shards of Tessera's own."
    )
    image: str | None = Field(
        None,
        description="The extension of the members that are the pictures, for example png or "
        "input.jpg. Default: webp, png, jpg or jpeg.",
    )
    captions: Annotated[tuple[str, ...], OptionName("caption")] = Field(
        (),
        description="The extension of the members that are captions, or a field of the JSON, with "
        "the language if it is not --language: txt, json.prompt, zh.txt:zh; may be repeated. "
        "Default: txt and caption, also with a language before (zh.txt), and every field of the "
        "JSON with a name like caption, text or caption_zh.",
    )

    def samples(self) -> Iterator[Sample | LeftOut]:
        """Tar by tar. Of a key that came in an earlier tar, the tar's name becomes a part.

        Raises:
            DataError: there are no tars, or one is damaged.
        """
        before: set[str] = set()
        tars = self._tars()
        for name in tars.names:
            here: set[str] = set()
            for found in tars.read(name):
                prefix = key_prefix(name) if found.key in before else ""
                yield from _outcomes(found, prefix, here, tars, name)
            before |= here
        yield from tars.left_out

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
        tars, tally, shards = self._tars(), Tally(), []
        root = "." if same_folder(self.folder, output) else _address(tars.folder)
        there = InPlace(root=root, members=tars.members, **tars.credits.model_dump())
        before: set[str] = set()
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            for shard, part, keys in pool.map(partial(_count, tars), tars.names):
                if not before.isdisjoint(keys):
                    shard = shard.model_copy(update={"repeats_keys": True})
                    # a sample that names no group is its own, by its key
                    part.groups = {shard.prefix * (g in keys) + g for g in part.groups}
                before |= keys
                shards.append(shard)
                tally.merge(part)
        for lost in tars.left_out:
            tally.add(lost)
        tally.check()
        return Manifest.of(shards, tally, there)

    def _tars(self) -> _Tars:
        folder = Folder.at(self.folder)
        listing = folder.listing(follow_links=self.follow_links)
        names = [name for name in listing.names if name.endswith(TAR_SUFFIXES)]
        if not names:
            raise DataError(
                f"there is no tar in {self.folder}: check the path or URI"
                + "".join(f"; {x.reason}: {x.example} (--follow-links)" for x in listing.left_out)
            )
        image = None if self.image is None else self.image.lower().removeprefix(".")
        fields = self.caption_fields().items()
        captions = {name.removeprefix("."): language for name, language in fields}
        members = Members(image=image, captions=captions)
        credits = self.credits(self.folder)
        left_out = [replace(lost, of="file") for lost in listing.left_out]
        return _Tars(folder, names, members, credits, left_out)


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


@dataclass(frozen=True)
class _Tars:
    """The tars of a folder, and how they are read.

    Attributes:
        left_out: files of the folder that are not read.
    """

    folder: Folder
    names: Sequence[str]
    members: Members
    credits: Credits
    left_out: Sequence[LeftOut]

    def read(self, name: str) -> Iterator[TarSample]:
        """The samples of one tar."""
        with open_patiently(self.folder.fs, f"{self.folder.root}/{name}") as stream:
            yield from read_samples(stream, name=name, members=self.members)


def _count(tars: _Tars, name: str) -> tuple[Shard, Tally, set[str]]:
    """Read one tar to its end; what it holds, and its keys."""
    tally, samples, keys = Tally(), 0, set[str]()
    with open_patiently(tars.folder.fs, f"{tars.folder.root}/{name}") as raw:
        stream: Any = _Hashing(raw)
        for found in read_samples(stream, name=name, members=tars.members):
            samples += 1
            for outcome in _outcomes(found, "", keys, tars, name):
                tally.add(outcome)
        while stream.read(CHUNK):
            pass
    if not samples:
        raise DataError(
            f"{name} in {tars.folder.address} holds no samples (KEY.jpg, KEY.txt, KEY.json)"
        )
    digest = stream.sha256.hexdigest()
    return Shard(file=name, samples=samples, bytes=stream.size, sha256=digest), tally, keys


def _outcomes(
    found: TarSample, prefix: str, keys: set[str], tars: _Tars, tar: str
) -> Iterator[Sample | LeftOut]:
    """A sample of a tar, and what of it cannot be used.

    Args:
        prefix: of its key.
        keys: of the tar so far; the sample's own is added.
        tar: the tar's name, for examples.
    """
    where = f"{tar}: {found.key}"
    has = f"has {', '.join(found.files) or 'nothing'}"
    problem = found.problem or ("duplicate_key" if found.key in keys else None)
    keys.add(found.key)
    if problem:
        yield LeftOut(problem, where)
        return
    try:
        record, left_out = record_of(prefix + found.key, found.files, tars.credits, tars.members)
    except BadCaption as error:
        yield LeftOut(error.reason, where)
        return
    if bad := image_problem(found.image):
        yield LeftOut(bad[0], f"{where} {has if found.image is None else bad[1]}")
        return
    yield from (lost.within(where) for lost in left_out)
    captions = [Caption(c["text"], c["language"]) for c in record.pop("captions")]
    if not captions:
        yield LeftOut(NO_CAPTION, f"{where} {has}")
    for extension in found.files:
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS and extension != found.image_extension:
            yield LeftOut("not_read", f"{where}.{extension}", "file")
    kind = (found.image_extension or "").rpartition(".")[2]
    yield make_sample(prefix + found.key, found.image or b"", kind, captions, record)


def same_folder(one: str, other: str) -> bool:
    """Whether two paths or URIs mean one folder."""
    (fs, path), (other_fs, other_path) = open_uri(one), open_uri(other)
    return bool(fs == other_fs) and path == other_path
