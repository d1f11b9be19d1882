"""Writing shard sets: the same samples give the same bytes, and a re-run replaces, never appends.

Shards have the start of their SHA-256 in their name, and the manifest is published last, in one
move: a reader sees the old set or the new one, and a writer that dies leaves the old one whole.

    manifest = write_shards(EmojiSource().samples(), "shards/emoji")
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
from webdataset import TarWriter

from pipeline.contracts import LeftOut, Sample
from pipeline.data.shards.files import PARTIAL, publish
from pipeline.data.shards.manifest import MANIFEST, SHARD_NAME, Manifest, Shard, open_uri
from pipeline.data.shards.tally import Tally
from pipeline.errors import DataError

_KEY = re.compile(r"^[A-Za-z0-9_-]+$")
_OURS = re.compile(SHARD_NAME.removesuffix("$") + rf"({re.escape(PARTIAL)})?$")
_TAR_BLOCK = 512  # bytes
MAX_SHARD_BYTES = 256_000_000


def write_shards(
    samples: Iterable[Sample | LeftOut],
    output: str | Path,
    *,
    max_bytes: int = MAX_SHARD_BYTES,
    compress: bool = False,
) -> Manifest:
    """Write a shard set, replacing what `output` held.

    Args:
        samples: in the order they are to be stored; what is left out is counted in the manifest.
        output: folder or URI.
        max_bytes: of a shard, before compression.
        compress: gzip the shards; pays where small images make tar headers most of the file.

    Raises:
        DataError: no sample that can be used, or a key that is used twice or is not a plain name.
    """
    fs, root = open_uri(str(output))
    fs.create_dir(root, recursive=True)
    tally, shards = Tally(), []
    for index, batch in enumerate(_batches(_checked(samples, tally), max_bytes)):
        shards.append(_write_shard(fs, root, index, batch, compress))
    manifest = Manifest.of(shards, tally)
    _replace(fs, root, manifest)
    return manifest


def write_index(manifest: Manifest, output: str | Path) -> None:
    """Write the manifest of tars that stay where they are, replacing the set `output` held."""
    fs, root = open_uri(str(output))
    fs.create_dir(root, recursive=True)
    _replace(fs, root, manifest)


def _replace(fs: pyarrow.fs.FileSystem, root: str, manifest: Manifest) -> None:
    """Publish the manifest, then remove the shards of the set before it."""
    publish(fs, f"{root}/{MANIFEST}", manifest.model_dump_json(indent=1).encode() + b"\n")
    kept = {shard.file for shard in manifest.shards}
    for info in fs.get_file_info(pyarrow.fs.FileSelector(root)):
        if _OURS.match(info.base_name) and info.base_name not in kept:
            fs.delete_file(info.path)


def _checked(samples: Iterable[Sample | LeftOut], tally: Tally) -> Iterator[Sample]:
    """The samples as they are counted.

    Raises:
        DataError: a key that cannot be stored, or, at the end, no sample that can be used.
    """
    keys: set[str] = set()
    for sample in samples:
        tally.add(sample)
        if isinstance(sample, LeftOut):
            continue
        if not _KEY.match(sample.key) or sample.key in keys:
            raise DataError(
                f"sample key {sample.key!r} is a duplicate or has other characters than letters, "
                "digits, '-' and '_'"
            )
        keys.add(sample.key)
        yield sample
    tally.check()


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
    """Bytes that a file of `size` bytes takes in a tar: a header, and whole blocks."""
    return _TAR_BLOCK * (1 + -(-size // _TAR_BLOCK))


def _write_shard(
    fs: pyarrow.fs.FileSystem, root: str, index: int, batch: list[Sample], compress: bool
) -> Shard:
    """Build the tar in a temporary file, name it by its digest, publish it."""
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
        publish(fs, f"{root}/{name}", stream)
    return Shard(file=name, samples=len(batch), bytes=size, sha256=sha256)


def _write_tar(stream: Any, batch: list[Sample]) -> None:
    with TarWriter(stream, user="tessera", group="tessera", mtime=0, encoder=False) as tar:
        for sample in batch:
            files = {"json": _record(sample)}
            if sample.image:
                files[sample.extension] = sample.image
            tar.write({"__key__": sample.key, **files})


def _record(sample: Sample) -> bytes:
    """Everything of a sample but its image, as it stands in KEY.json."""
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
