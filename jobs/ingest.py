"""Ingest: captioned images from a source into a shard set.

Run:

    tessera ingest emoji --vendor noto --vendor twemoji
"""

from __future__ import annotations

from pathlib import Path

from pipeline.contracts import Source
from pipeline.data.shards.manifest import Manifest
from pipeline.data.shards.tally import settled
from pipeline.data.shards.writer import MAX_SHARD_BYTES, write_index, write_shards


def ingest(
    source: Source,
    output: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    compress: bool = False,
) -> Manifest:
    """Write a source's samples as shards, replacing the set that `output` held.

    Of a source that is read where it is (`Source.index`) only a manifest is written. The manifest
    says what was found, used and left out, with the reasons.

    Args:
        output: folder or URI.
        max_shard_bytes: of a shard, before compression.
        compress: gzip the shards.

    Raises:
        DataError: the source is missing, empty or damaged, or nothing of it can be used.
        PretrainedNotFoundError: what the source downloads cannot be had.
    """
    manifest = source.index(str(output))
    if manifest is None:
        return write_shards(settled(source), output, max_bytes=max_shard_bytes, compress=compress)
    write_index(manifest, output)
    return manifest
