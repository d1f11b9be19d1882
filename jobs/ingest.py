"""Ingest: captioned pictures from a source into a shard set.

Run:

    tessera ingest emoji --vendor noto --vendor twemoji
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.shard_writer import write_shards
from pipeline.shards import Manifest
from pipeline.sources.emoji import SHIPPED_VENDORS, EmojiSource


def ingest_emoji(
    output: str | Path,
    *,
    cache: Path,
    vendors: Sequence[str] = SHIPPED_VENDORS,
    languages: Sequence[str] = ("en", "zh"),
    skin_tones: bool = False,
    max_shard_bytes: int = 256_000_000,
    compress: bool = False,
) -> Manifest:
    """Write emoji pictures and captions as shards, replacing what `output` held.

    Raises:
        PretrainedNotFoundError: a package cannot be fetched.
        DataError: an unknown vendor or language, or a damaged package.
    """
    source = EmojiSource(cache, vendors, languages, skin_tones)
    return write_shards(source.samples(), output, max_bytes=max_shard_bytes, compress=compress)
