"""Writing shard sets: the same samples give the same bytes, and a re-run replaces, never appends.

Shards carry the start of their SHA-256 in their name and the manifest is written last, in one
move: a reader sees the old set or the new one, and a writer that dies leaves the old one whole.

    manifest = write_shards(EmojiSource(cache).samples(), "shards/emoji")
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow.fs
from webdataset import TarWriter

from pipeline.contracts import Sample
from pipeline.errors import DataError
from pipeline.shards import (
    CHUNK,
    MANIFEST,
    SCHEMA_VERSION,
    SHARD_NAME,
    Manifest,
    Shard,
    dataset_digest,
    open_uri,
)

_KEY = re.compile(r"^[A-Za-z0-9_-]+$")
_OURS = re.compile(SHARD_NAME.removesuffix("$") + r"(\.partial)?$")
_TAR_BLOCK = 512  # bytes


@dataclass
class _Totals:
    keys: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {k: Counter() for k in ("styles", "licenses", "sources")}
    )
    languages: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        if not _KEY.match(sample.key) or sample.key in self.keys:
            raise DataError(
                f"sample key {sample.key!r} is a duplicate or has other characters than letters, "
                "digits, '-' and '_'"
            )
        self.keys.add(sample.key)
        self.groups.add(sample.group)
        self.counts["styles"][sample.style] += 1
        self.counts["licenses"][sample.license] += 1
        self.counts["sources"][sample.source] += 1
        self.languages.update(caption.language for caption in sample.captions)

    def manifest(self, shards: list[Shard]) -> Manifest:
        return Manifest(
            schema_version=SCHEMA_VERSION,
            digest=dataset_digest(shards),
            samples=len(self.keys),
            groups=len(self.groups),
            languages=dict(sorted(self.languages.items())),
            shards=tuple(shards),
            **{name: dict(sorted(counter.items())) for name, counter in self.counts.items()},
        )


def write_shards(
    samples: Iterable[Sample],
    output: str | Path,
    *,
    max_bytes: int = 256_000_000,
    compress: bool = False,
) -> Manifest:
    """Write a shard set, replacing what `output` held.

    Args:
        samples: in the order they are to be stored.
        output: folder or URI.
        max_bytes: of a shard, before compression.
        compress: gzip the shards; pays where small pictures make tar headers most of the file.

    Raises:
        DataError: no samples, or a key that is used twice or is not a plain name.
    """
    fs, root = open_uri(str(output))
    fs.create_dir(root, recursive=True)
    totals, shards = _Totals(), []
    for index, batch in enumerate(_batches(samples, max_bytes)):
        for sample in batch:
            totals.add(sample)
        shards.append(_write_shard(fs, root, index, batch, compress))
    if not shards:
        raise DataError(f"nothing to write to {output}: the source yielded no samples")
    manifest = totals.manifest(shards)
    _put(fs, f"{root}/{MANIFEST}", manifest.model_dump_json(indent=1).encode() + b"\n")
    _remove_others(fs, root, {shard.file for shard in shards})
    return manifest


def _batches(samples: Iterable[Sample], max_bytes: int) -> Iterator[list[Sample]]:
    """Samples shard by shard; one that is larger than max_bytes has a shard of its own."""
    batch: list[Sample] = []
    filled = 0
    for sample in samples:
        size = _stored_bytes(len(sample.image)) + _stored_bytes(len(_record(sample)))
        if batch and filled + size > max_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(sample)
        filled += size
    if batch:
        yield batch


def _stored_bytes(size: int) -> int:
    """What a file of `size` bytes takes in a tar: a header, and whole blocks."""
    return _TAR_BLOCK * (1 + -(-size // _TAR_BLOCK))


def _write_shard(
    fs: pyarrow.fs.FileSystem, root: str, index: int, batch: list[Sample], compress: bool
) -> Shard:
    """Build the tar in a temporary file, name it by its digest, move it into place."""
    with tempfile.TemporaryFile() as stream:
        if compress:
            with gzip.GzipFile("", "wb", compresslevel=9, fileobj=stream, mtime=0) as packed:
                _write_tar(packed, batch)
        else:
            _write_tar(stream, batch)
        size = stream.tell()
        stream.seek(0)
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        name = f"{index:05d}-{sha256[:12]}.tar{'.gz' if compress else ''}"
        stream.seek(0)
        _put(fs, f"{root}/{name}", stream)
    return Shard(file=name, samples=len(batch), bytes=size, sha256=sha256)


def _write_tar(stream: Any, batch: list[Sample]) -> None:
    with TarWriter(stream, user="tessera", group="tessera", mtime=0, encoder=False) as tar:
        for sample in batch:
            files = {"json": _record(sample)}
            if sample.image:
                files[sample.extension] = sample.image
            tar.write({"__key__": sample.key, **files})


def _record(sample: Sample) -> bytes:
    """Everything of a sample but its picture, as it stands in KEY.json."""
    record = {
        "captions": [{"text": c.text, "language": c.language} for c in sample.captions],
        "group": sample.group,
        "style": sample.style,
        "source": sample.source,
        "license": sample.license,
        "attribution": sample.attribution,
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # half a character: quarantined as bad_utf8


def write_index(manifest: Manifest, output: str | Path) -> None:
    """Write the manifest of tars that stay where they are, replacing the set `output` held."""
    fs, root = open_uri(str(output))
    fs.create_dir(root, recursive=True)
    _put(fs, f"{root}/{MANIFEST}", manifest.model_dump_json(indent=1).encode() + b"\n")
    _remove_others(fs, root, {shard.file for shard in manifest.shards})


def _put(fs: pyarrow.fs.FileSystem, path: str, content: bytes | IO[bytes]) -> None:
    """Write beside `path`, then move: never half a file under its final name."""
    with fs.open_output_stream(f"{path}.partial", compression=None) as out:
        if isinstance(content, bytes):
            out.write(content)
        else:
            while chunk := content.read(CHUNK):
                out.write(chunk)
    fs.move(f"{path}.partial", path)


def _remove_others(fs: pyarrow.fs.FileSystem, root: str, keep: set[str]) -> None:
    for info in fs.get_file_info(pyarrow.fs.FileSelector(root)):
        if _OURS.match(info.base_name) and info.base_name not in keep:
            fs.delete_file(info.path)
