"""Shards -> encoded samples with Ray Data, as one stream a task: nothing encoded is copied around.

    dataset = map_samples(shards, filesystem, work, tasks=4)

Tasks read parts of shards; `work` is called there with some samples at a time and what it returns
is a block of the data set. Whoever wrote a shard, its samples come out alike: key, picture, record
(our JSON) and, where the tar itself makes a sample unusable, the problem.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray.data

from pipeline.captions import BadCaption
from pipeline.records import Credits, record_of
from pipeline.storage import open_patiently
from pipeline.tars import TarSample, read_samples

WORK_BYTES = 16_000_000  # of encoded pictures, and
WORK_SAMPLES = 256  # at most that are worked on together
PART_SAMPLES = 512  # at least: all that lies before a part in its shard must be read past

Samples = Sequence[dict[str, Any]]
"""Each of shard, number (its place in the shard), key, picture, record and problem."""


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
    """Parts of shards in, blocks of results out."""

    filesystem: pyarrow.fs.FileSystem
    shards: Mapping[str, ShardFile]
    work: Callable[[Samples], pa.Table]

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for part in batch.to_pylist():
            samples = self._read(self.shards[part["label"]], part["start"], part["end"])
            yield from map(self.work, _batches(samples))

    def _read(self, shard: ShardFile, start: int, end: int) -> Iterator[dict[str, Any]]:
        """The last part reads on to the end of the tar, which may promise too little."""
        last = end == shard.samples
        with open_patiently(self.filesystem, shard.path) as stream:
            for number, sample in enumerate(read_samples(stream, name=shard.label)):
                if number >= end and not last:
                    return
                if number >= start:
                    yield _row(sample, shard, number)


def _batches(samples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += len(sample["picture"] or b"") + len(sample["record"] or b"")
        if len(batch) == WORK_SAMPLES or size > WORK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _row(sample: TarSample, shard: ShardFile, number: int) -> dict[str, Any]:
    problem, record = sample.problem, sample.files.get("json")
    key = sample.key.encode("utf-8", "backslashreplace").decode()
    if key != sample.key:  # a name that is not UTF-8
        problem = problem or "bad_utf8"
    if shard.credits is not None and problem is None:
        try:
            record = json.dumps(record_of(sample.key, sample.files, shard.credits)).encode()
        except BadCaption as error:
            problem = error.reason
    return {
        "shard": shard.label,
        "number": number,
        "key": key,
        "picture": sample.picture,
        "record": record,
        "problem": problem,
    }


def map_samples(
    shards: Sequence[ShardFile],
    filesystem: pyarrow.fs.FileSystem,
    work: Callable[[Samples], pa.Table],
    *,
    tasks: int,
) -> ray.data.Dataset:
    """`work` on every sample of the shards, in `tasks` tasks at once.

    A damaged shard raises DataError in its task, an unreachable one OSError.
    """
    reader = _Reader(filesystem, {shard.label: shard for shard in shards}, work)
    parts = [pa.Table.from_pylist([part]) for part in parts_of(shards, tasks)]
    dataset = ray.data.from_arrow(parts)
    return dataset.map_batches(
        reader,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=tasks),
    )


def parts_of(shards: Sequence[ShardFile], tasks: int) -> Iterator[dict[str, Any]]:
    """Parts of shards in their order, big ones first and small ones at the end: few beginnings are
    read past, and all tasks end at about the same time. A shard without samples is a part, too.

    Source: Polychronopoulos and Kuck 1987, "Guided self-scheduling".
    """
    remaining = sum(shard.samples for shard in shards)
    for shard in shards:
        start, whole = 0, False
        while not whole:
            size = max(PART_SAMPLES, remaining // (2 * tasks))
            whole = shard.samples - start < 1.5 * size
            end = shard.samples if whole else start + size
            yield {"label": shard.label, "start": start, "end": end}
            remaining -= end - start
            start = end
