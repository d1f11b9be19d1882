"""Reading what preprocessing and encoding wrote: rows of Parquet, and columns larger than memory.

Training takes rows in random order, which compressed Parquet cannot give. A small column is
therefore read into memory. A large one is written once, uncompressed, as a flat file beside the
Parquet files and memory-mapped: the system keeps as much of it in memory as there is room for.

    table = read_table(directory, split="train")
    images = read_pixels(directory, table["row_index"].to_numpy(), image_size=64)
    images[np.array([7, 3])]        # uint8 (2, 3, 64, 64)

Shapes: S = image_size pixels per side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

from pipeline.artifacts import publish_once
from pipeline.config import ImageFilter
from pipeline.errors import DataError

IN_MEMORY_BYTES = 1 << 30  # of a column; a larger one is mapped
ROWS_PER_READ = 256  # of a Parquet file
BUFFER_BYTES = 1 << 20  # of a Parquet file, read at once


class MappedRows:
    """Chosen rows of a memory-mapped array; only what is indexed is read.

    `rows[i]` gives the rows numbered by the int64 array i; `rows[i, j]` gives one element of the
    second dimension per row.

    Args:
        array: memory-mapped, (all rows, ...).
        indices: int64, the chosen rows of `array`, in the order that they are numbered in.
    """

    def __init__(self, array: NDArray[Any], indices: NDArray[np.int64]) -> None:
        self.array, self.indices = array, indices
        self.shape = (len(indices), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(
        self, rows: NDArray[np.int64] | tuple[NDArray[np.int64], NDArray[np.int64]]
    ) -> NDArray[Any]:
        if isinstance(rows, tuple):
            return np.asarray(self.array[self.indices[rows[0]], rows[1]])
        return np.asarray(self.array[self.indices[rows]])


def parquet_files(directory: Path) -> list[Path]:
    """The Parquet files of a directory, in the order that "row_index" counts rows in."""
    return sorted(directory.glob("*.parquet"))


def read_table(
    directory: Path,
    *,
    split: str | Sequence[str] | None = None,
    image_filter: ImageFilter | None = None,
    columns: Sequence[str] | None = None,
    captioned: bool = False,
) -> pa.Table:
    """Rows of a directory of Parquet files, filtered and sorted by key.

    Args:
        directory: pixels or image tokens.
        split: "train", "validation" or "test", or several of them; None takes all.
        image_filter: which styles to keep.
        columns: to read beside key, split and style; None reads all.
        captioned: leave out rows without a caption; needs the column "captions".

    Returns:
        The columns, and "row_index": the row's number among all rows of the directory, for
        `read_pixels` and `read_tokens`.

    Raises:
        DataError: no file, no row left, or a style that `image_filter` weighs and no image has.
    """
    names = None if columns is None else sorted({*columns, "key", "split", "style"})
    files = [str(path) for path in parquet_files(directory)]
    if not files:
        raise DataError(f"there are no Parquet files in {directory}: run the step that writes them")
    table = pads.dataset(files).to_table(names)
    table = table.append_column("row_index", pa.array(np.arange(len(table))))
    if image_filter is not None:
        _check_weighted_styles(table, image_filter)
    kept = _kept(table, split, image_filter, captioned)
    if not kept.any():
        raise DataError(
            f"none of the {len(table)} pictures in {directory} has split={split!r}, styles "
            f"{image_filter}{' and a caption' if captioned else ''}: check the recipe's data and "
            "filter sections"
        )
    if not kept.all():
        table = table.filter(pa.array(kept))
    return table.sort_by("key")


def _kept(
    table: pa.Table,
    split: str | Sequence[str] | None,
    image_filter: ImageFilter | None,
    captioned: bool,
) -> NDArray[np.bool_]:
    """bool (rows,); one mask, since filtering again and again would copy the columns each time."""
    kept = np.ones(len(table), bool)
    if split is not None:
        splits = pa.array([split] if isinstance(split, str) else split)
        kept &= pc.is_in(table["split"], splits).to_numpy()
    if image_filter is not None and image_filter.styles:
        kept &= pc.is_in(table["style"], pa.array(image_filter.styles)).to_numpy()
    if image_filter is not None and image_filter.exclude_styles:
        kept &= ~pc.is_in(table["style"], pa.array(image_filter.exclude_styles)).to_numpy()
    if captioned:
        has_captions = pc.greater(pc.list_value_length(table["captions"]), 0)
        kept &= has_captions.fill_null(False).to_numpy()
    return kept


def _check_weighted_styles(table: pa.Table, image_filter: ImageFilter) -> None:
    styles = pc.unique(table["style"]).to_pylist()
    if unknown := sorted(set(image_filter.style_weights) - set(styles)):
        raise DataError(
            f"style_weights names {', '.join(unknown)}, which no picture has; the styles are "
            f"{', '.join(sorted(styles))}"
        )


def fixed_width(column: pa.ChunkedArray, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """A binary column whose rows are arrays of one dtype and shape -> array (rows, *shape)."""
    flat = np.frombuffer(b"".join(column.to_pylist()), dtype=dtype)
    return flat.reshape(len(column), *shape)


def read_pixels(
    directory: Path, indices: NDArray[np.int64], *, image_size: int
) -> NDArray[np.uint8] | MappedRows:
    """The images of the rows numbered `indices` (see `read_table`), in that order.

    Returns:
        uint8 (rows, 3, S, S); in memory if the directory holds few, else mapped.

    Raises:
        DataError: the images are not of that size.
    """
    try:
        return _read(directory, "image", indices, np.dtype(np.uint8), (3, image_size, image_size))
    except WrongLengthError as error:
        raise DataError(f"{error}: preprocess.image_size is not what they were made with") from None


def read_tokens(
    directory: Path, indices: NDArray[np.int64], *, num_tokens: int
) -> NDArray[np.uint16] | MappedRows:
    """The image tokens of the rows numbered `indices`, as `read_pixels` reads images.

    Returns:
        uint16 (rows, views, num_tokens); in memory if the directory holds few, else mapped.

    Raises:
        DataError: the rows do not hold views of that many tokens.
    """
    with pq.ParquetFile(parquet_files(directory)[0]) as file:
        first = next(file.iter_batches(1, columns=["image_tokens"])).column(0)[0].as_py()
    views, rest = divmod(len(first), 2 * num_tokens)
    if rest:
        raise DataError(f"{directory} has rows of {len(first)} bytes, not of {num_tokens} tokens")
    return _read(directory, "image_tokens", indices, np.dtype(np.uint16), (views, num_tokens))


class WrongLengthError(ValueError):
    """A row of a binary column is not as long as every row must be."""


def flat_file(directory: Path, column: str) -> Path:
    """Where a mapped column is stored; Parquet readers pass over names with an underscore."""
    return directory / f"_{column}.flat"


def _read(
    directory: Path,
    column: str,
    indices: NDArray[np.int64],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> NDArray[Any] | MappedRows:
    """The rows numbered `indices` of a binary column whose rows are arrays of a dtype and shape."""
    width = dtype.itemsize * math.prod(shape)
    total = sum(pq.read_metadata(path).num_rows for path in parquet_files(directory))
    if total * width <= IN_MEMORY_BYTES:
        array = np.empty((len(indices), width), np.uint8)
        target = np.full(total, -1, np.int64)  # by row of the directory, its row in the array
        target[indices] = np.arange(len(indices))
        first = 0
        for batch in _batches(directory, column, width):
            rows = target[first : first + len(batch)]
            array[rows[rows >= 0]] = batch[rows >= 0]
            first += len(batch)
        return array.view(dtype).reshape(-1, *shape)
    _write_flat_file(directory, column, total, width)
    mapped = np.memmap(flat_file(directory, column), dtype, "r", shape=(total, *shape))
    return MappedRows(mapped, indices)


def _write_flat_file(directory: Path, column: str, total: int, width: int) -> None:
    """Write a column's flat file unless it exists; of several processes one does, others wait."""

    def is_whole(file: Path) -> bool:
        return file.is_file() and file.stat().st_size == total * width

    def write(file: Path) -> None:
        with file.open("wb") as out:
            for rows in _batches(directory, column, width):
                out.write(rows.data)
            out.flush()
            os.fsync(out.fileno())

    publish_once(flat_file(directory, column), write, is_done=is_whole)


def _batches(directory: Path, column: str, width: int) -> Iterator[NDArray[np.uint8]]:
    """A binary column of all files as uint8 (rows, width), a few rows at a time.

    Row groups are read one by one, without Arrow's threads and read-ahead, which hold a whole file.
    """
    for path in parquet_files(directory):
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(
                    ROWS_PER_READ, row_groups=[group], columns=[column], use_threads=False
                ):
                    yield _equal_rows(batch.column(0), width, path)


def _equal_rows(column: pa.BinaryArray, width: int, path: Path) -> NDArray[np.uint8]:
    """A binary column without nulls as uint8 (rows, width); no bytes are copied.

    Raises:
        WrongLengthError: a row has another length; the message names the file.
    """
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    lengths = np.diff(ends)
    if (wrong := lengths != width).any():
        raise WrongLengthError(f"{path} holds rows of {lengths[wrong][0]} bytes, expected {width}")
    flat = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
    return flat.reshape(len(column), width)
