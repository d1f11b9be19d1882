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
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.config import ImageFilter


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
