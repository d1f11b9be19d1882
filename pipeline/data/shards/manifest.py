"""Shard sets: WebDataset tars beside a manifest that counts, credits and checks them.

A sample is KEY.webp (or .png, .jpg) and KEY.json. Sets lie in a local folder or wherever PyArrow's
file systems reach (s3://, gs://), and pipeline/data/shards/writer.py writes them. A manifest may
also stand for tars that someone else wrote and that are read where they are
(pipeline/data/sources/webdataset.py).

    print(read_manifest("shards/emoji").licenses)
    assert verify("shards/emoji") == []
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.artifacts import ASSETS
from pipeline.data.shards.files import CHUNK, open_patiently
from pipeline.data.shards.records import Credits
from pipeline.data.shards.tally import NO_CAPTION, Loss, Tally
from pipeline.data.shards.tars import TAR_SUFFIXES, Members
from pipeline.errors import DataError

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
SHARD_NAME = r"^\d{5}-[0-9a-f]{12}\.tar(\.gz)?$"
CHECKED_AT_ONCE = 8  # shards, when a set is verified


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One tar of a set.

    Attributes:
        file: path below the set's folder, or below InPlace.root.
        repeats_keys: keys of an earlier tar are in this one again, for other samples; `prefix`
            tells them apart.
    """

    file: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    repeats_keys: bool = Field(False, exclude_if=lambda value: not value)

    @property
    def prefix(self) -> str:
        """What stands before the keys of its samples to make them unique in the set."""
        return key_prefix(self.file) if self.repeats_keys else ""


class InPlace(Credits):
    """Tars that someone else wrote and that are read where they are, and what is true of all their
    samples that do not say otherwise.

    Attributes:
        root: the folder or URI that they are in; "." is the manifest's own.
        members: which members of a sample are its image and its captions.
    """

    root: str = Field(min_length=1)
    members: Members = Field(Members(), exclude_if=lambda value: value == Members())


class Manifest(_Record):
    """What a set holds: its shards, and how many samples of which kind.

    Attributes:
        digest: SHA-256 over the schema version and the shards' digests; names the data set.
        samples: how many.
        groups: how many different ones the samples have.
        styles: samples by style; `licenses` and `sources` likewise.
        languages: captions, not samples, by language.
        in_place: where the shards are, if Tessera did not write them.
        losses: what the source held and cannot be used, by reason. Images of tars that are read in
            place are still in them, and so are images without a caption in any set; others are not.
    """

    schema_version: Literal[1]
    digest: str
    samples: int
    groups: int
    styles: dict[str, int]
    licenses: dict[str, int]
    sources: dict[str, int]
    languages: dict[str, int]
    shards: tuple[Shard, ...]
    in_place: InPlace | None = Field(None, exclude_if=lambda value: value is None)
    losses: tuple[Loss, ...] = Field((), exclude_if=lambda value: not value)

    @classmethod
    def of(cls, shards: Sequence[Shard], tally: Tally, in_place: InPlace | None = None) -> Manifest:
        """The manifest of these shards, whose samples were counted."""
        return cls(
            schema_version=SCHEMA_VERSION,
            digest=dataset_digest(shards, in_place),
            samples=sum(shard.samples for shard in shards),
            groups=len(tally.groups),
            shards=tuple(shards),
            in_place=in_place,
            losses=tally.losses(),
            **{name: dict(sorted(counter.items())) for name, counter in tally.counts.items()},
        )

    @property
    def found(self) -> int:
        """Images that the source held, or should have held."""
        kept = {NO_CAPTION} if self.in_place is None else {loss.reason for loss in self.losses}
        return self.samples + self._lost(but=kept)

    @property
    def used(self) -> int:
        """Images that can be used, with a caption where one was expected."""
        return self.found - self._lost()

    def _lost(self, but: Collection[str] = ()) -> int:
        lost = (x for x in self.losses if x.of == "image" and x.reason not in but)
        return sum(loss.count for loss in lost)

    @model_validator(mode="after")
    def _names_are_safe(self) -> Manifest:
        for shard in self.shards:
            if self.in_place is None:
                fits = re.match(SHARD_NAME, shard.file) is not None
            else:
                fits = shard.file.endswith(TAR_SUFFIXES) and ".." not in shard.file.split("/")
            if not fits or shard.file.startswith("/"):
                raise ValueError(f"{shard.file!r} is no shard's name")
        return self


@dataclass(frozen=True)
class Problem:
    """A shard that is not what the manifest says."""

    file: str
    kind: Literal["missing", "truncated", "altered", "surplus"]
    detail: str

    def __str__(self) -> str:
        return f"{self.file} is {self.kind} ({self.detail})"


def locate(uri: str, home: Path | None = None) -> str:
    """Where a shard set is: asset:NAME ships with Tessera, home:NAME is HOME/shards/NAME, anything
    else is a folder or URI already.

    Raises:
        DataError: no such asset, or home:NAME without a home.
    """
    kind, _, name = uri.partition(":")
    if kind == "asset":
        if not (ASSETS / name / MANIFEST).is_file():
            there = sorted(p.parent.name for p in ASSETS.glob(f"*/{MANIFEST}"))
            raise DataError(f"no shard set {uri!r} ships with Tessera; there are: {there}")
        return str(ASSETS / name)
    if kind == "home":
        if home is None:
            raise DataError(f"{uri!r} lies under the home directory, and none was given")
        return str(home / "shards" / name)
    return uri


def open_uri(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system that a folder or URI is on, and its path there.

    Raises:
        DataError: PyArrow does not read such a URI.
    """
    if "://" in uri:
        try:
            return pyarrow.fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(
                f"cannot open {uri} ({error}); give a folder, or a URI as s3://BUCKET/FOLDER, "
                "gs://BUCKET/FOLDER or file:///FOLDER"
            ) from error
    return pyarrow.fs.LocalFileSystem(), str(Path(uri).resolve())


def unreachable(uri: str, error: OSError) -> DataError:
    """The error for a file system that does not answer, or refuses the credentials."""
    return DataError(
        f"cannot read {uri}: {error}. Check the address, the network, and the credentials in this "
        "environment (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
    )


def open_shards(uri: str, manifest: Manifest) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system that the shards of the set at `uri` are on, and their folder there."""
    there = manifest.in_place
    return open_uri(uri if there is None or there.root == "." else there.root)


def check_one_file_system(systems: Sequence[pyarrow.fs.FileSystem], sets: Iterable[str]) -> None:
    """Raises DataError unless all shard sets lie on the same one."""
    if any(system != systems[0] for system in systems):
        raise DataError(
            f"data.shards lie on several file systems ({', '.join(sets)}): copy them to one"
        )


def read_manifest(uri: str) -> Manifest:
    """The manifest of a shard set.

    Raises:
        DataError: there is none, or it is not one this version reads.
    """
    fs, root = open_uri(uri)
    try:
        with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
            text = stream.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"no {MANIFEST} in {uri}: not a shard set; write one with `tessera ingest`"
        ) from error
    except OSError as error:
        raise unreachable(uri, error) from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{uri}/{MANIFEST} is damaged: {where}: {first['msg']}") from error
    if manifest.digest != dataset_digest(manifest.shards, manifest.in_place):
        raise DataError(f"{uri}/{MANIFEST} is damaged: its digest is not that of its shards")
    return manifest


def verify(uri: str) -> list[Problem]:
    """Read every byte of a set; return each shard that is missing, truncated, altered or surplus.

    Raises:
        DataError: the manifest itself cannot be read.
    """
    manifest = read_manifest(uri)
    fs, root = open_shards(uri, manifest)
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
        checked = pool.map(lambda shard: _check(fs, root, shard), manifest.shards)
        problems = [problem for problem in checked if problem is not None]
    known = {shard.file for shard in manifest.shards}
    surplus = [name for name in list_tars(fs, root) if name not in known]
    return [*problems, *(Problem(name, "surplus", "not in the manifest") for name in surplus)]


def find_absent(uri: str, manifest: Manifest) -> list[Problem]:
    """The shards that are missing or of another size than the manifest says; none is read.

    Raises:
        DataError: the file system does not answer.
    """
    fs, root = open_shards(uri, manifest)
    try:
        found = fs.get_file_info([f"{root}/{shard.file}" for shard in manifest.shards])
    except OSError as error:
        raise unreachable(uri, error) from error
    checked = map(_check_size, found, manifest.shards)
    return [problem for problem in checked if problem is not None]


def list_tars(fs: pyarrow.fs.FileSystem, root: str) -> list[str]:
    """The path below `root` of every tar in it and its folders, sorted; empty without a folder."""
    selector = pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True)
    paths = (info.path for info in fs.get_file_info(selector))
    return sorted(p.removeprefix(f"{root}/") for p in paths if p.endswith(TAR_SUFFIXES))


def key_prefix(file: str) -> str:
    """What tells the keys of a tar from the same ones in another: its path without suffix.

    >>> key_prefix("train/00001.tar.gz")
    'train/00001/'
    """
    suffix = next(suffix for suffix in TAR_SUFFIXES if file.endswith(suffix))
    return f"{file.removesuffix(suffix)}/"


def _check(fs: pyarrow.fs.FileSystem, root: str, shard: Shard) -> Problem | None:
    path = f"{root}/{shard.file}"
    if problem := _check_size(fs.get_file_info(path), shard):
        return problem
    digest = hashlib.sha256()
    with open_patiently(fs, path) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        return Problem(shard.file, "altered", f"SHA-256 is {digest.hexdigest()}")
    return None


def _check_size(info: pyarrow.fs.FileInfo, shard: Shard) -> Problem | None:
    if info.type != pyarrow.fs.FileType.File:
        return Problem(shard.file, "missing", f"{shard.samples} samples")
    if info.size != shard.bytes:
        kind: Literal["truncated", "altered"]
        kind = "truncated" if info.size < shard.bytes else "altered"
        return Problem(shard.file, kind, f"{info.size} of {shard.bytes} bytes")
    return None


def dataset_digest(shards: Iterable[Shard], in_place: InPlace | None = None) -> str:
    """The name of a data set: SHA-256 over the schema version and its shards' digests.

    For tars that are read in place it covers their credits too, but not where they are.
    """
    lines = [f"schema {SCHEMA_VERSION}", *(shard.sha256 + shard.prefix for shard in shards)]
    if in_place is not None:
        lines.append(in_place.model_dump_json(exclude={"root"}))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
