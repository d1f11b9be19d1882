"""Shards -> encoded samples with Ray Data: every task streams the part of a shard it works on.

Encoded images are never copied between processes: a task reads samples and calls `work` on them,
and what `work` returns becomes a block of the data set. Samples of Tessera's own shards and of
tars that someone else wrote look the same from here on.

    dataset = map_samples(shards, filesystem, work, tasks=4)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import pyarrow as pa
import pyarrow.fs

from pipeline.data.shards.captions import BadCaption
from pipeline.data.shards.files import open_patiently
from pipeline.data.shards.manifest import InPlace
from pipeline.data.shards.records import record_of
from pipeline.data.shards.tars import TarSample, read_samples

if TYPE_CHECKING:  # takes 1.5 s to import; who only reads samples does without it
    import ray.data

WORK_BYTES = 16_000_000  # of encoded images that are worked on together,
WORK_SAMPLES = 256  # and of samples at most
PART_SAMPLES = 512  # at least: to read a part, all that lies before it in its shard is read, too


class EncodedSample(TypedDict):
    """A sample as its shard holds it.

    shard: the label of its shard.
    index: of the sample in its shard, from 0.
    key: its name.
    image: the encoded image; None if there is none.
    record: JSON with captions, group, style and credits; None if there is none.
    problem: the reason if the tar itself makes the sample unusable, else None.
    """

    shard: str
    index: int
    key: str
    image: bytes | None
    record: bytes | None
    problem: str | None


class Part(TypedDict):
    """The samples from `start` to `end` of the shard with this label."""

    label: str
    start: int
    end: int


Work = Callable[[Sequence[EncodedSample]], pa.Table]


@dataclass(frozen=True)
class ShardFile:
    """A shard to read.

    Attributes:
        label: SET/FILE, its name in tables.
        path: on the file system.
        samples: how many its manifest promises.
        in_place: how to read a tar that someone else wrote and that is read in place; else None.
        prefix: what stands before the keys of its samples.
    """

    label: str
    path: str
    samples: int
    in_place: InPlace | None = None
    prefix: str = ""


@dataclass(frozen=True)
class _PartReader:
    """What a Ray Data task runs: parts of shards in, blocks of results out."""

    filesystem: pyarrow.fs.FileSystem
    shards: Mapping[str, ShardFile]
    work: Work

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        for part in parts.to_pylist():
            samples = self._read(self.shards[part["label"]], part["start"], part["end"])
            yield from map(self.work, _batches(samples))

    def _read(self, shard: ShardFile, start: int, end: int) -> Iterator[EncodedSample]:
        """The last part reads to the end of the tar, which may hold more than was promised."""
        is_last = end == shard.samples
        with open_patiently(self.filesystem, shard.path) as stream:
            members = shard.in_place.members if shard.in_place is not None else None
            samples = read_samples(stream, name=shard.label, members=members)
            for index, sample in enumerate(samples):
                if index >= end and not is_last:
                    return
                if index >= start:
                    yield _encoded_sample(sample, shard, index)


def _batches(samples: Iterable[EncodedSample]) -> Iterator[list[EncodedSample]]:
    batch: list[EncodedSample] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += len(sample["image"] or b"") + len(sample["record"] or b"")
        if len(batch) == WORK_SAMPLES or size > WORK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded_sample(sample: TarSample, shard: ShardFile, index: int) -> EncodedSample:
    problem, record = sample.problem, sample.files.get("json")
    named = shard.prefix + sample.key
    key = named.encode("utf-8", "backslashreplace").decode()
    if key != named:  # a name that is not UTF-8
        problem = problem or "bad_utf8"
    if shard.in_place is not None and problem is None:
        there = shard.in_place
        try:
            found, _ = record_of(named, sample.files, there, there.members)
            record = json.dumps(found).encode()
        except BadCaption as error:
            problem = error.reason
    return {
        "shard": shard.label,
        "index": index,
        "key": key,
        "image": sample.image,
        "record": record,
        "problem": problem,
    }


def map_samples(
    shards: Sequence[ShardFile], filesystem: pyarrow.fs.FileSystem, work: Work, *, tasks: int
) -> ray.data.Dataset:
    """Call `work` on every sample of the shards, in at most `tasks` tasks at once.

    Args:
        shards: to read, all on the file system.
        filesystem: where they are.
        work: is given up to WORK_SAMPLES samples of one shard; what it returns becomes a block.
        tasks: Ray tasks at once.

    Returns:
        The blocks, lazily. While it is read, a damaged shard raises DataError in its task, and one
        that cannot be reached OSError (`workers.worker_errors` raises them here).
    """
    import ray.data

    from pipeline.data.preprocess.workers import Telling

    reader = _PartReader(filesystem, {shard.label: shard for shard in shards}, work)
    parts = [pa.Table.from_pylist([part]) for part in parts_of(shards, tasks)]
    dataset = ray.data.from_arrow(parts)
    return dataset.map_batches(
        Telling(reader),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=tasks),
    )


def parts_of(shards: Sequence[ShardFile], tasks: int) -> Iterator[Part]:
    """The shards cut into parts, in their order: big parts first, small ones at the end.

    Big parts make little be read in vain, since a part's task also reads what lies before it in
    the shard; small ones at the end let all tasks end at about the same time. A shard that
    promises no samples is one part, too.

    Source: Polychronopoulos and Kuck 1987, "Guided self-scheduling".
    """
    remaining = sum(shard.samples for shard in shards)
    for shard in shards:
        start, is_last = 0, False
        while not is_last:
            size = max(PART_SAMPLES, remaining // (2 * tasks))
            is_last = shard.samples - start < 1.5 * size
            end = shard.samples if is_last else start + size
            yield {"label": shard.label, "start": start, "end": end}
            remaining -= end - start
            start = end
