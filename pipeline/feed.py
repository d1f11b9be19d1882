"""Feeding training: a global order, equal steps on all ranks, an exact position to resume at.

The order of one epoch is a permutation by (seed, epoch) alone (where rows have weights, as many
draws by weight), so it does not depend on the number of workers; a step takes the next `batch_size`
rows of that endless order and every rank reads its own stride of them. The step number is therefore
the exact position: a training that resumes at step k repeats nothing and skips nothing. Which
caption and which view of a row are taken, and how augmentation changes its picture, is drawn for
its place in the global batch, so that this does not depend on the number of workers either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import torch
from torch import Tensor

from pipeline.config import ImageFilter
from pipeline.errors import DataError
from pipeline.pixel_store import MappedRows, parquet_files, read_pixels


@dataclass(frozen=True, eq=False)
class RowWeights:
    """How often training draws each row, relative to the others: float64 (rows,), positive."""

    values: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, only: ImageFilter | None) -> RowWeights | None:
        """A group of n rows weighs n ** exponent, in equal shares, and every row by its style too.

        Conneau et al. 2020 ("Unsupervised cross-lingual representation learning at scale", section
        3.1) draw languages so.

        Args:
            table: what `read_table` gives, with "group" where the filter has a group_exponent.

        Returns:
            None if all rows weigh the same.
        """
        if only is None:
            return None
        values = np.ones(len(table))
        if only.group_exponent != 1:
            groups = table["group"].combine_chunks().dictionary_encode().indices.to_numpy()
            values = np.bincount(groups)[groups] ** (only.group_exponent - 1.0)
        for style, weight in only.style_weights.items():
            values[pc.equal(table["style"], style).to_numpy()] *= weight
        return None if (values == values[0]).all() else cls(values)


class Dataset(Protocol):
    """Rows that can be read in any order; with `weights`, some of them are drawn more often."""

    weights: RowWeights | None

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, draws: np.ndarray | None) -> dict[str, Tensor]:
        """The rows as tensors.

        `draws`, float64 (rows, 2) in [0, 1), picks among captions and views; None takes the first.
        """


def global_rows(
    step: int, *, length: int, batch_size: int, seed: int, weights: RowWeights | None = None
) -> np.ndarray:
    """The rows of one step, int64 (batch_size,), the same on every rank."""
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    epochs = positions // length
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _order(seed, int(epoch), length, weights)[positions[here] % length]
    return rows


@lru_cache(maxsize=1)  # 8 bytes a row; shuffling anew every step would take longer than the step
def _order(seed: int, epoch: int, length: int, weights: RowWeights | None) -> np.ndarray:
    """One epoch's `length` draws; with weights by systematic sampling (Madow 1949), which draws a
    row as often as its share says, rounded up or down."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(length)
    if weights is None:
        return order
    ends = np.cumsum(weights.values[order])
    points = (np.arange(length) + rng.random()) * (ends[-1] / length)
    drawn = order[np.searchsorted(ends[:-1], points, side="right")]
    return rng.permutation(drawn)


def training_batch(
    dataset: Dataset, step: int, *, batch_size: int, seed: int, rank: int, world_size: int
) -> dict[str, Tensor]:
    """What `rank` trains on at `step`: batch_size / world_size rows.

    Beside what the dataset gives: "seeds" int64 (rows,), for `Augment`.
    """
    rows = global_rows(
        step, length=len(dataset), batch_size=batch_size, seed=seed, weights=dataset.weights
    )
    rng = np.random.default_rng((seed, step))
    draws, seeds = rng.random((batch_size, 2)), rng.integers(2**62, size=batch_size)
    mine = slice(rank, None, world_size)
    return dataset.batch(rows[mine], draws[mine]) | {"seeds": torch.from_numpy(seeds[mine])}


def validation_rows(
    length: int, *, batch_size: int, num_batches: int, rank: int, world_size: int
) -> list[np.ndarray]:
    """This rank's share of the validation rows, evenly spread over the set, always the same.

    Batches are of equal size, give or take a row, so that no rank is left with an odd one.
    """
    rows = spread(length, batch_size * num_batches)
    batches = np.array_split(rows, math.ceil(len(rows) / batch_size))
    return [batch[rank::world_size] for batch in batches]


def spread(length: int, count: int) -> np.ndarray:
    """Up to `count` of the rows 0 to length - 1, evenly spread: int64."""
    return np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)


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


class ImageDataset:
    """Pixels alone, for training without captions.

    Batches: {"images": uint8 (B, 3, H, W)}.
    """

    def __init__(
        self, images: np.ndarray | MappedRows, *, weights: RowWeights | None = None
    ) -> None:
        self.images, self.weights = images, weights

    @classmethod
    def from_parquet(
        cls, directory: Path, *, image_size: int, split: str, only: ImageFilter | None = None
    ) -> ImageDataset:
        """The accepted pixels of one split, mapped from disk where they are many."""
        grouped = only is not None and only.group_exponent != 1
        columns = ["group"] if grouped else []  # a text a row, which many rows would feel
        table = read_table(directory, split=split, only=only, columns=columns)
        images = read_pixels(directory, table["place"].to_numpy(), image_size=image_size)
        return cls(images, weights=RowWeights.of(table, only))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, draws: np.ndarray | None) -> dict[str, Tensor]:
        return {"images": torch.from_numpy(self.images[rows])}


class CaptionStates:
    """The frozen encoder's states of every distinct caption, memory-mapped.

    On disk: states.npy float16 (all tokens, width), offsets.npy int64 (captions + 1,).
    """

    def __init__(self, directory: Path, *, max_tokens: int) -> None:
        self.states = np.load(directory / "states.npy", mmap_mode="r")
        self.offsets = np.load(directory / "offsets.npy")
        self.max_tokens = max_tokens

    @property
    def width(self) -> int:
        return int(self.states.shape[1])

    def batch(self, ids: np.ndarray) -> dict[str, Tensor]:
        """{"caption_states": float16 (B, L, width), "caption_mask": bool (B, L)}, L max_tokens."""
        states = np.zeros((len(ids), self.max_tokens, self.width), np.float16)
        mask = np.zeros((len(ids), self.max_tokens), bool)
        for row, caption in enumerate(ids):
            tokens = self.states[self.offsets[caption] : self.offsets[caption + 1]]
            states[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return {"caption_states": torch.from_numpy(states), "caption_mask": torch.from_numpy(mask)}


class CaptionIds:
    """Every distinct caption as token ids; `read` gives ids int64 (B, L) and mask bool (B, L)."""

    def __init__(
        self, texts: Sequence[str], read: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    ) -> None:
        self.ids, self.mask = read(texts)

    def batch(self, ids: np.ndarray) -> dict[str, Tensor]:
        """{"caption_ids": int64 (B, L), "caption_mask": bool (B, L)}."""
        return {"caption_ids": self.ids[ids], "caption_mask": self.mask[ids]}


class Ragged:
    """Arrays of unequal lengths, one a row, without an object for each."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray) -> None:
        self.values = values
        self.ends = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.ends[row] : self.ends[row + 1]]


class CaptionedDataset:
    """Pictures (pixels or image tokens), each with one of its captions.

    Batches: `arrays`, each (rows, ...) or with views (rows, views, ...); "caption_states" or
    "caption_ids", "caption_mask"; "style" and "group" int64 (B,). An array "flippable", bool
    (rows,), says which pictures `Augment` may mirror.
    """

    def __init__(
        self,
        *,
        arrays: Mapping[str, np.ndarray | MappedRows],
        viewed: frozenset[str],
        caption_ids: Sequence[np.ndarray] | Ragged,
        captions: CaptionStates | CaptionIds,
        style: np.ndarray,
        group: np.ndarray,
        weights: RowWeights | None = None,
    ) -> None:
        self.arrays, self.viewed = dict(arrays), viewed
        self.caption_ids, self.captions = caption_ids, captions
        self.style, self.group, self.weights = style, group, weights

    def __len__(self) -> int:
        return len(self.caption_ids)

    def batch(self, rows: np.ndarray, draws: np.ndarray | None) -> dict[str, Tensor]:
        draws = np.zeros((len(rows), 2)) if draws is None else draws
        known = [self.caption_ids[row] for row in rows]
        chosen = np.array(
            [ids[int(d * len(ids))] for ids, d in zip(known, draws[:, 0], strict=True)]
        )
        batch = self.captions.batch(chosen)
        for name, array in self.arrays.items():
            if name in self.viewed:
                picked = array[rows, (draws[:, 1] * array.shape[1]).astype(int)]
            else:
                picked = array[rows]
            if picked.dtype == np.uint16:
                picked = picked.astype(np.int64)
            batch[name] = torch.from_numpy(np.ascontiguousarray(picked))
        batch["style"] = torch.from_numpy(self.style[rows])
        batch["group"] = torch.from_numpy(self.group[rows])
        return batch
