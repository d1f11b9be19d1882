"""Tars that someone else wrote in WebDataset's manner, img2dataset's output included.

They are read where they are: `index()` makes a manifest that counts and checks them, and
preprocessing takes captions and credits from KEY.json and KEY.txt (pipeline/records.py).
`samples()` yields the same as Samples, for whoever wants them as shards of our own.

    write_index(WebDatasetSource("s3://bucket/laion", credits).index(), "home:laion")
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from pipeline.captions import BadCaption
from pipeline.contracts import Caption, Sample
from pipeline.errors import DataError
from pipeline.records import Credits, plain_key, record_of
from pipeline.shards import (
    CHUNK,
    SCHEMA_VERSION,
    InPlace,
    Manifest,
    Shard,
    dataset_digest,
    list_tars,
    open_uri,
)
from pipeline.sources._files import make_sample
from pipeline.storage import open_patiently
from pipeline.tars import PICTURES, TarSample, read_samples

READ_AT_ONCE = 4  # tars
COUNTED = {"style": "styles", "license": "licenses", "source": "sources"}


class _Hashing(io.RawIOBase):
    """Passes a stream's bytes on and sums them up."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        chunk = self.stream.read(size)
        self.sha256.update(chunk)
        self.size += len(chunk)
        return chunk


@dataclass
class _Count:
    """What one tar holds."""

    shard: Shard
    groups: set[str] = field(default_factory=set)
    kinds: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in (*COUNTED.values(), "languages")}
    )


class WebDatasetSource:
    """The tars of a folder and the folders in it.

    Args:
        folder: a path or URI.
        credits: what the samples do not say themselves.

    Raises (from samples() and index()):
        DataError: no tars, or one that is damaged.
    """

    def __init__(self, folder: str, credits: Credits) -> None:
        self.folder, self.credits = folder, credits
        self.fs, self.root = open_uri(folder)

    def samples(self) -> Iterator[Sample]:
        """Tar by tar; what cannot be used comes without its picture, a key that came before too."""
        seen: set[str] = set()
        for name in self._tars():
            with open_patiently(self.fs, f"{self.root}/{name}") as stream:
                for found in read_samples(stream, name=name):
                    sample = _sample(found, self.credits)
                    for number in count(2):
                        if sample.key not in seen:
                            break
                        sample = replace(sample, key=f"{plain_key(found.key)}-{number}", image=b"")
                    seen.add(sample.key)
                    yield sample

    def index(self, *, here: bool = False) -> Manifest:
        """Count and check every tar.

        Args:
            here: the manifest will lie beside the tars, and be moved with them.
        """
        there = InPlace(root="." if here else self._address(), **self.credits.model_dump())
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            counts = list(pool.map(self._count, self._tars()))
        shards = tuple(count.shard for count in counts)
        kinds = {name: sum((c.kinds[name] for c in counts), Counter()) for name in counts[0].kinds}
        return Manifest(
            schema_version=SCHEMA_VERSION,
            digest=dataset_digest(shards, there),
            samples=sum(shard.samples for shard in shards),
            groups=len(set().union(*(count.groups for count in counts))),
            shards=shards,
            in_place=there,
            **{name: dict(sorted(counter.items())) for name, counter in kinds.items()},
        )

    def _address(self) -> str:
        """The folder as a manifest elsewhere can name it.

        Raises:
            DataError: there are credentials in it.
        """
        if "://" in self.folder and "@" in urlsplit(self.folder).netloc:
            raise DataError(
                "the manifest names this URI, and there are credentials in it: leave them out, and "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or what the store reads, or --copy"
            )
        return self.folder if "://" in self.folder else self.root

    def _tars(self) -> list[str]:
        names = list_tars(self.fs, self.root)
        if not names:
            raise DataError(f"there is no tar in {self.folder}: check the path or URI")
        return names

    def _count(self, name: str) -> _Count:
        samples, groups = 0, set()
        kinds = {kind: Counter[str]() for kind in (*COUNTED.values(), "languages")}
        with open_patiently(self.fs, f"{self.root}/{name}") as raw:
            stream: Any = _Hashing(raw)
            for found in read_samples(stream, name=name):
                samples += 1
                try:
                    record = record_of(found.key, found.files, self.credits)
                except BadCaption:
                    continue  # promised all the same: preprocessing quarantines it with its reason
                groups.add(record["group"])
                for column, kind in COUNTED.items():
                    kinds[kind][record[column]] += 1
                kinds["languages"].update(c["language"] for c in record["captions"])
            while stream.read(CHUNK):
                pass
        if not samples:
            raise DataError(
                f"{name} in {self.folder} holds no samples (KEY.jpg, KEY.txt, KEY.json)"
            )
        shard = Shard(
            file=name, samples=samples, bytes=stream.size, sha256=stream.sha256.hexdigest()
        )
        return _Count(shard, groups, kinds)


def _sample(found: TarSample, credits: Credits) -> Sample:
    try:
        record = record_of(found.key, found.files, credits)
    except BadCaption:
        record = record_of(found.key, {}, credits)
    extension = next((name for name in PICTURES if name in found.files), "jpg")
    image = b"" if found.problem else (found.picture or b"")
    captions = [Caption(c["text"], c["language"]) for c in record.pop("captions")]
    return make_sample(found.key, image, extension, captions, record)


def same_folder(one: str, other: str) -> bool:
    """Whether two addresses mean one folder."""
    (fs, path), (other_fs, other_path) = open_uri(one), open_uri(other)
    return bool(fs == other_fs) and path == other_path
