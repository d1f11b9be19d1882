"""The folder in which a preprocessing run gathers rows, and from which it writes its tables.

Every decoded sample is a row (schema rows.STAGED) in a Parquet file of its shard's folder, so
that a run which was killed goes on with the shards that are not whole yet. When all are, their
outcomes are resolved (pipeline/data/preprocess/report.py), and `write_tables` copies the accepted
rows into the final tables: one task per shard, since a shard's pixels must fit into memory and all
of them need not.

    STAGING/staged/00007/000000256.parquet      rows of shard 7 from its sample 256 on
    STAGING/final/pixels/00007.parquet          the accepted ones, sorted by key
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray

from pipeline.artifacts import publishing
from pipeline.data.preprocess.reader import EncodedSample, ShardFile
from pipeline.data.preprocess.rows import PIXELS, STAGED, RowDecoder
from pipeline.runtime import return_memory, task_slots

ROW_GROUP_BYTES = 64_000_000  # of pixels: of a row group in the final tables, and of a staged file
OUTCOME_COLUMNS = (
    "key", "shard", "index", "group", "style", "split", "digest", "perceptual_hash", "outcome",
)  # fmt: skip
"""What the rules over all rows need, and the report; pixels and captions stay on disk."""


def rows_per_group(image_size: int) -> int:
    """How many images of this many pixels per side make ROW_GROUP_BYTES; at least one."""
    return max(1, ROW_GROUP_BYTES // (3 * image_size**2))


def shard_folder(staged: Path, shard_index: int) -> Path:
    """Where the rows of one shard are staged."""
    return staged / f"{shard_index:05d}"


@dataclass(frozen=True)
class StagingWriter:
    """Decodes samples of one shard and writes the rows into its folder; runs in a Ray task.

    Attributes:
        decoder: samples -> rows.
        folders: by the shard's label.
        rows_per_file: at most.
    """

    decoder: RowDecoder
    folders: Mapping[str, str]
    rows_per_file: int

    def __call__(self, samples: Sequence[EncodedSample]) -> pa.Table:
        """One row per file that was written: "outcomes", the list of its samples' outcomes."""
        written = []
        for start in range(0, len(samples), self.rows_per_file):
            chunk = samples[start : start + self.rows_per_file]
            table = self.decoder.table(chunk)
            folder = Path(self.folders[chunk[0]["shard"]])
            folder.mkdir(exist_ok=True)
            with publishing(folder / f"{chunk[0]['index']:09d}.parquet") as path:
                pq.write_table(table, path, compression="lz4")
            written.append({"outcomes": table["outcome"].to_pylist()})
        return_memory()
        return pa.Table.from_pylist(written)


def is_staged(folder: Path, shard: ShardFile) -> bool:
    """Whether the folder holds as many rows as the shard promises."""
    rows = sum(int(pq.read_metadata(path).num_rows) for path in folder.glob("[0-9]*.parquet"))
    return rows == shard.samples


def staged_outcomes(staged: Path) -> pa.Table:
    """OUTCOME_COLUMNS of every staged row; a shard's label is in memory once, not per row."""
    fields = [
        pa.field("shard", pa.dictionary(pa.int32(), pa.string())) if f.name == "shard" else f
        for f in STAGED
    ]
    stored = pads.ParquetFileFormat(read_options={"dictionary_columns": {"shard"}})
    dataset = pads.dataset(staged, schema=pa.schema(fields), format=stored)
    return dataset.to_table(list(OUTCOME_COLUMNS))


def left_out_captions(staged: Path) -> dict[str, int]:
    """How many captions samples lost that were accepted when they were decoded, by reason."""
    column = pads.dataset(staged, schema=STAGED).to_table(["captions_left_out"]).column(0)
    counted = pc.value_counts(pc.list_flatten(column)).to_pylist()
    return {row["values"]: row["counts"] for row in counted}


def write_tables(
    staged: Path,
    final: Path,
    accepted: pa.Table,
    quarantine: pa.Table,
    *,
    num_shards: int,
    image_size: int,
) -> None:
    """Write pixels/ and quarantine/ below `final`, replacing what an interrupted run left there.

    One Ray task per shard; no more at once than truly run at once, since each holds its shard's
    pixels.

    Args:
        staged: the staged rows.
        final: is made.
        accepted: columns "shard_index" and "index" of the accepted rows, sorted by the former.
        quarantine: the table of quarantined samples.
        num_shards: how many there are.
        image_size: pixels per side.
    """
    shutil.rmtree(final, ignore_errors=True)
    for name in ("pixels", "quarantine"):
        (final / name).mkdir(parents=True)
    pq.write_table(quarantine, final / "quarantine" / "00000.parquet")
    write = ray.remote(_write_pixels)
    running: list[ray.ObjectRef[None]] = []
    edges = np.searchsorted(accepted["shard_index"].to_numpy(), np.arange(num_shards + 1))
    for shard_index, (start, end) in enumerate(pairwise(edges)):
        if start < end:
            indices = accepted["index"].slice(start, end - start).combine_chunks()
            folder = shard_folder(staged, shard_index)
            target = final / "pixels" / f"{shard_index:05d}.parquet"
            if len(running) == task_slots():
                done, running = ray.wait(running)
                ray.get(done)
            running.append(write.remote(folder, indices, target, rows_per_group(image_size)))
    ray.get(running)


def _write_pixels(folder: Path, indices: pa.Array, target: Path, group_rows: int) -> None:
    """Write the accepted rows of one shard, sorted by key."""
    is_accepted = pc.field("index").isin(indices)
    table = pads.dataset(folder, schema=STAGED).to_table(PIXELS.names, filter=is_accepted)
    order = pc.sort_indices(table["key"])
    # rows are taken from one chunk, whose offsets may need more than 32 bits
    images = table["image"].cast(pa.large_binary()).combine_chunks()
    table = table.drop_columns("image").combine_chunks()
    repeated = [name for name in PIXELS.names if name not in ("key", "image")]
    with pq.ParquetWriter(target, PIXELS, compression="zstd", use_dictionary=repeated) as writer:
        for start in range(0, len(order), group_rows):
            rows = order.slice(start, group_rows)
            taken = table.take(rows).append_column("image", images.take(rows).cast(pa.binary()))
            writer.write_table(taken.select(PIXELS.names))
    del table, images
    pa.default_memory_pool().release_unused()  # the process goes on with other work
    return_memory()
