"""Rows that may be larger than memory: a flat file beside the Parquet, mapped instead of read.

A training takes rows in random order, which compressed Parquet cannot give. So the pixels (or image
tokens) of a large set are written once, uncompressed, into the folder of the Parquet, where the
system keeps as much of them in memory as there is room for.

    images = read_pixels(directory, places, image_size=64)
    images[np.array([7, 3])]        # uint8 (2, 3, 64, 64)
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
from numpy.typing import NDArray

from pipeline.artifacts import publish_once
from pipeline.config import ImageFilter
from pipeline.errors import DataError

IN_MEMORY_BYTES = 1 << 30  # of a column; more are mapped
BATCH = 256  # rows read from Parquet at once
BUFFER_BYTES = 1 << 20  # of a file, read at once


class MappedRows:
    """Rows of a mapped array, chosen and put in order; indexing reads only what it asks for.

    `rows[numbers]`, or `rows[numbers, others]` with one index a row into the second dimension.
    """

    def __init__(self, array: NDArray[Any], places: NDArray[np.int64]) -> None:
        self.array, self.places = array, places
        self.shape = (len(places), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(
        self, rows: NDArray[np.int64] | tuple[NDArray[np.int64], NDArray[np.int64]]
    ) -> NDArray[Any]:
        if isinstance(rows, tuple):
            return np.asarray(self.array[self.places[rows[0]], rows[1]])
        return np.asarray(self.array[self.places[rows]])


def parquet_files(directory: Path) -> list[Path]:
    """The Parquet files of a folder, in the order that places count in."""
    return sorted(directory.glob("*.parquet"))


def read_table(
    directory: Path,
    *,
    split: str | Sequence[str] | None = None,
    only: ImageFilter | None = None,
    columns: Sequence[str] | None = None,
    captioned: bool = False,
) -> pa.Table:
    """Rows of a Parquet directory, filtered by split and style, sorted by key.

    With `captioned`, which needs that column, rows without a caption are left out. The column
    "place" counts the rows as `read_pixels` does.

    Raises:
        DataError: nothing is left, or `only` weighs a style that no picture has.
    """
    wanted = None if columns is None else sorted({*columns, "key", "split", "style"})
    files = [str(path) for path in parquet_files(directory)]
    if not files:
        raise DataError(f"there are no Parquet files in {directory}: run the step that writes them")
    table = pads.dataset(files).to_table(wanted)
    found = table.num_rows
    table = table.append_column("place", pa.array(np.arange(found)))
    if only is not None and only.style_weights:
        _check_styles(table, only)
    if split is not None:
        splits = pa.array([split] if isinstance(split, str) else split)
        table = table.filter(pc.is_in(table["split"], splits))
    if only is not None and only.styles:
        table = table.filter(pc.is_in(table["style"], pa.array(only.styles)))
    if only is not None and only.exclude_styles:
        table = table.filter(pc.invert(pc.is_in(table["style"], pa.array(only.exclude_styles))))
    if captioned:
        table = table.filter(pc.greater(pc.list_value_length(table["captions"]), 0))
    if not table.num_rows:
        raise DataError(
            f"none of the {found} pictures in {directory} has split={split!r}, styles {only}"
            f"{' and a caption' if captioned else ''}: check the recipe's data and filter sections"
        )
    return table.sort_by("key")


def _check_styles(table: pa.Table, only: ImageFilter) -> None:
    styles = pc.unique(table["style"]).to_pylist()
    if unknown := sorted(set(only.style_weights) - set(styles)):
        raise DataError(
            f"style_weights names {', '.join(unknown)}, which no picture has; the styles are "
            f"{', '.join(sorted(styles))}"
        )


def fixed_width(
    column: pa.ChunkedArray, dtype: np.dtype | type, shape: tuple[int, ...]
) -> np.ndarray:
    """A binary column of equal lengths as one array (rows, *shape)."""
    flat = np.frombuffer(b"".join(column.to_pylist()), dtype=dtype)
    return flat.reshape(len(column), *shape)


def read_pixels(
    directory: Path, places: NDArray[np.int64], *, image_size: int
) -> NDArray[np.uint8] | MappedRows:
    """The pictures at `places` among all rows of the folder's Parquet files, in that order.

    Returns:
        uint8 (rows, 3, S, S); in memory if they are few, else mapped.

    Raises:
        DataError: the pictures are not of that size.
    """
    try:
        return _read(directory, "image", places, np.dtype(np.uint8), (3, image_size, image_size))
    except WrongLengthError as error:
        raise DataError(f"{error}: preprocess.image_size is not what they were made with") from None


def read_tokens(
    directory: Path, places: NDArray[np.int64], *, num_tokens: int
) -> NDArray[np.uint16] | MappedRows:
    """The image tokens at `places`, as `read_pixels`: uint16 (rows, views, num_tokens)."""
    with pq.ParquetFile(parquet_files(directory)[0]) as file:
        first = next(file.iter_batches(1, columns=["image_tokens"])).column(0)[0].as_py()
    views, rest = divmod(len(first), 2 * num_tokens)
    if rest:
        raise DataError(f"{directory} has rows of {len(first)} bytes, not of {num_tokens} tokens")
    return _read(directory, "image_tokens", places, np.dtype(np.uint16), (views, num_tokens))


class WrongLengthError(ValueError):
    """A row is not as long as all should be."""


def flat_file(directory: Path, column: str) -> Path:
    """Where a mapped column lies; Parquet readers leave names with an underscore aside."""
    return directory / f"_{column}.flat"


def _read(
    directory: Path, column: str, places: NDArray[np.int64], dtype: np.dtype, shape: tuple[int, ...]
) -> NDArray[Any] | MappedRows:
    """`places` of a binary column whose rows are arrays of a dtype and shape."""
    width = dtype.itemsize * math.prod(shape)
    total = sum(pq.read_metadata(path).num_rows for path in parquet_files(directory))
    if total * width <= IN_MEMORY_BYTES:
        array = np.empty((len(places), width), np.uint8)
        wanted = np.full(total, -1, np.int64)
        wanted[places] = np.arange(len(places))
        first = 0
        for found in _batches(directory, column, width):
            rows = wanted[first : first + len(found)]
            array[rows[rows >= 0]] = found[rows >= 0]
            first += len(found)
        return array.view(dtype).reshape(-1, *shape)
    _flatten(directory, column, total, width)
    flat = flat_file(directory, column)
    return MappedRows(np.memmap(flat, dtype, "r", shape=(total, *shape)), places)


def _flatten(directory: Path, column: str, total: int, width: int) -> None:
    """Write the flat file unless it is there; of several processes one does, the others wait."""

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
    """A column as uint8 (rows, width) of all files, a few rows at a time.

    Row group by row group and without Arrow's threads and read-ahead: these hold a whole file.
    """
    for path in parquet_files(directory):
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(
                    BATCH, row_groups=[group], columns=[column], use_threads=False
                ):
                    yield _equal_rows(batch.column(0), width, path)


def _equal_rows(column: pa.BinaryArray, width: int, path: Path) -> NDArray[np.uint8]:
    """A binary column without nulls as uint8 (rows, width); no bytes are copied."""
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    lengths = np.diff(ends)
    if (wrong := lengths != width).any():
        raise WrongLengthError(f"{path} holds rows of {lengths[wrong][0]} bytes, expected {width}")
    flat = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
    return flat.reshape(len(column), width)
