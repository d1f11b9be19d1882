"""Pixels that may be larger than memory: a flat file beside the Parquet, mapped instead of read.

A training takes rows in random order, which compressed Parquet cannot give. So the pixels of a
large set are written once, uncompressed, into the folder of the Parquet, where the system keeps as
much of them in memory as there is room for.

    images = read_pixels(directory, places, image_size=64)
    images[np.array([7, 3])]        # uint8 (2, 3, 64, 64)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError

IN_MEMORY_BYTES = 1 << 30  # of pixels; more are mapped
BATCH = 256  # rows read from Parquet at once
FLAT = "_pixels.uint8"  # Parquet readers leave names with an underscore aside


class MappedRows:
    """Rows of a mapped array, chosen and put in order; indexing reads only what it asks for."""

    def __init__(self, array: NDArray[np.uint8], places: NDArray[np.int64]) -> None:
        self.array, self.places = array, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.asarray(self.array[self.places[rows]])


def parquet_files(directory: Path) -> list[Path]:
    """The Parquet files of a folder, in the order that places count in."""
    return sorted(directory.glob("*.parquet"))


def read_pixels(
    directory: Path, places: NDArray[np.int64], *, image_size: int
) -> NDArray[np.uint8] | MappedRows:
    """The pictures at `places` among all rows of the folder's Parquet files, in that order.

    Returns:
        uint8 (rows, 3, S, S); in memory if they are few, else mapped.

    Raises:
        DataError: the pictures are not of that size.
    """
    picture = 3 * image_size**2
    total = sum(pq.read_metadata(path).num_rows for path in parquet_files(directory))
    if total * picture <= IN_MEMORY_BYTES:
        array = np.empty((len(places), picture), np.uint8)
        wanted = np.full(total, -1, np.int64)
        wanted[places] = np.arange(len(places))
        first = 0
        for images in _batches(directory, picture):
            rows = wanted[first : first + len(images)]
            array[rows[rows >= 0]] = images[rows >= 0]
            first += len(images)
        return array.reshape(-1, 3, image_size, image_size)
    _flatten(directory, total, picture)
    shape = (total, 3, image_size, image_size)
    return MappedRows(np.memmap(directory / FLAT, np.uint8, "r", shape=shape), places)


def _flatten(directory: Path, total: int, picture: int) -> None:
    """Write the flat file unless it is there; of several processes one does, the others wait."""
    flat = directory / FLAT
    with (directory / f"{FLAT}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if flat.is_file() and flat.stat().st_size == total * picture:
            return
        partial = flat.with_suffix(".partial")
        with partial.open("wb") as out:
            for images in _batches(directory, picture):
                out.write(images.tobytes())
            out.flush()
            os.fsync(out.fileno())
        partial.rename(flat)


def _batches(directory: Path, picture: int) -> Iterator[NDArray[np.uint8]]:
    """Pixels uint8 (rows, picture) of all files, a few rows at a time."""
    for path in parquet_files(directory):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=["image"]):
                images = batch.column(0).to_pylist()
                if any(len(image) != picture for image in images):
                    raise DataError(
                        f"{path} holds pictures of {len(images[0])} bytes, expected {picture}: "
                        "preprocess.image_size is not what they were made with"
                    )
                yield np.frombuffer(b"".join(images), np.uint8).reshape(-1, picture)
