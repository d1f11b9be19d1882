"""Shards -> encoded samples with Ray Data: a task a shard, as many bytes at once as a block holds.

    dataset = read_shards(shards, filesystem)        # columns ENCODED

Whoever wrote a shard, its samples come out alike: key, picture, record (our JSON) and, where the
tar itself makes a sample unusable, the problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray.data

from pipeline.captions import BadCaption
from pipeline.records import Credits, record_of
from pipeline.storage import open_patiently
from pipeline.tars import TarSample, read_samples

BLOCK_BYTES = 2_000_000  # of encoded samples that are decoded together
YIELD_SAMPLES = 128
READER_CPUS = 0.5  # another share than the decoder's, or Ray would make one task of both

ENCODED = pa.schema(
    [
        ("shard", pa.string()),
        ("number", pa.int64()),  # the sample's place in its shard
        ("key", pa.string()),
        ("picture", pa.binary()),
        ("record", pa.binary()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardFile:
    """A shard to read.

    Attributes:
        label: SET/FILE, its name in tables.
        path: on the file system.
        samples: as many as its manifest promises.
        credits: of a tar that is read in place; None for one of our own.
    """

    label: str
    path: str
    samples: int
    credits: Credits | None = None


@dataclass(frozen=True)
class _Reader:
    """Labels in, encoded samples out."""

    filesystem: pyarrow.fs.FileSystem
    shards: Mapping[str, ShardFile]
    pictures: bool

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for label in batch["label"].to_pylist():
            yield from self._read(self.shards[label])

    def _read(self, shard: ShardFile) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        size = 0
        with open_patiently(self.filesystem, shard.path) as stream:
            for number, sample in enumerate(read_samples(stream, name=shard.label)):
                row = _row(sample, shard, number, pictures=self.pictures)
                rows.append(row)
                size += len(row["picture"] or b"")
                if len(rows) == YIELD_SAMPLES or size > BLOCK_BYTES:
                    yield pa.Table.from_pylist(rows, schema=ENCODED)
                    rows, size = [], 0
        if rows:
            yield pa.Table.from_pylist(rows, schema=ENCODED)


def _row(sample: TarSample, shard: ShardFile, number: int, *, pictures: bool) -> dict[str, Any]:
    problem, record = sample.problem, sample.files.get("json")
    if shard.credits is not None and problem is None:
        try:
            record = json.dumps(record_of(sample.key, sample.files, shard.credits)).encode()
        except BadCaption as error:
            problem = error.reason
    return {
        "shard": shard.label,
        "number": number,
        "key": sample.key,
        "picture": sample.picture if pictures else None,
        "record": record,
        "problem": problem,
    }


def read_shards(
    shards: Sequence[ShardFile], filesystem: pyarrow.fs.FileSystem, *, pictures: bool = True
) -> ray.data.Dataset:
    """Every sample of the shards as an ENCODED row.

    A damaged shard raises DataError in its task, an unreachable one OSError.
    """
    reader = _Reader(filesystem, {shard.label: shard for shard in shards}, pictures)
    labels = [pa.table({"label": [shard.label]}) for shard in shards]
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_arrow(labels)
        return dataset.map_batches(
            reader, batch_size=1, batch_format="pyarrow", num_cpus=READER_CPUS
        )
