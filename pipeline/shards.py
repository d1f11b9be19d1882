"""Shard sets: WebDataset tars beside a manifest that counts, credits and checks them.

A sample is KEY.webp (or .png, .jpg) and KEY.json. Sets lie in a local folder or wherever pyarrow.fs
reaches (s3://, gs://). Written by pipeline/shard_writer.py.

    print(read_manifest("shards/emoji").licenses)
    assert verify("shards/emoji") == []
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import DataError

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
SHARD_NAME = r"^\d{5}-[0-9a-f]{12}\.tar(\.gz)?$"
ASSETS = Path(__file__).parent / "assets"
CHUNK = 1 << 20  # bytes read at once


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One tar of a set."""

    file: str = Field(pattern=SHARD_NAME)
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Record):
    """What a set promises: its shards, and how many samples of which kind.

    Attributes:
        digest: SHA-256 over the schema version and the shards' digests; names the data set.
        languages: captions, not samples, by language.
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


@dataclass(frozen=True)
class Problem:
    """A shard that is not what the manifest says."""

    file: str
    kind: Literal["missing", "truncated", "altered", "surplus"]
    detail: str

    def __str__(self) -> str:
        return f"{self.file} is {self.kind} ({self.detail})"


def locate(uri: str, home: Path | None = None) -> str:
    """asset:NAME -> the set that ships with Tessera, home:NAME -> the one under home, else as is.

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
    """The file system and the path in it that a folder or URI means."""
    if "://" in uri:
        return pyarrow.fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    return pyarrow.fs.LocalFileSystem(), str(Path(uri).resolve())


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
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{uri}/{MANIFEST} is damaged: {where}: {first['msg']}") from error
    if manifest.digest != dataset_digest(manifest.shards):
        raise DataError(f"{uri}/{MANIFEST} is damaged: its digest is not that of its shards")
    return manifest


def verify(uri: str) -> list[Problem]:
    """Every shard that is missing, truncated, altered or not in the manifest; reads all bytes.

    Raises:
        DataError: the manifest itself cannot be read.
    """
    fs, root = open_uri(uri)
    manifest = read_manifest(uri)
    problems = [p for shard in manifest.shards if (p := _check(fs, root, shard))]
    known = {shard.file for shard in manifest.shards}
    names = sorted(info.base_name for info in fs.get_file_info(pyarrow.fs.FileSelector(root)))
    surplus = [n for n in names if n.endswith((".tar", ".tar.gz", ".tgz")) and n not in known]
    return [*problems, *(Problem(name, "surplus", "not in the manifest") for name in surplus)]


def _check(fs: pyarrow.fs.FileSystem, root: str, shard: Shard) -> Problem | None:
    path = f"{root}/{shard.file}"
    info = fs.get_file_info(path)
    if info.type != pyarrow.fs.FileType.File:
        return Problem(shard.file, "missing", f"{shard.samples} samples")
    if info.size < shard.bytes:
        return Problem(shard.file, "truncated", f"{info.size} of {shard.bytes} bytes")
    digest = hashlib.sha256()
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        return Problem(shard.file, "altered", f"SHA-256 is {digest.hexdigest()}")
    return None


def dataset_digest(shards: Iterable[Shard]) -> str:
    """The name of a data set: SHA-256 over the schema version and its shards' digests."""
    text = "\n".join([f"schema {SCHEMA_VERSION}", *(shard.sha256 for shard in shards)])
    return hashlib.sha256(text.encode()).hexdigest()
