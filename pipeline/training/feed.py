"""Which rows a training step sees: a global order, equal steps on all ranks, exact resumption.

One epoch's order is a permutation that depends on (seed, epoch) alone; where rows have weights, it
is as many draws by weight. A step takes the next `batch_size` rows of the endless sequence of
epochs, and every rank takes its own stride of them. So

- the order does not depend on the number of workers;
- the step number is the exact position: a training resumed at step k repeats and skips nothing.

Which caption and which view of a row are taken, and how augmentation changes its image, is drawn
for the row's position in the global batch, so it does not depend on the number of workers either.

    batch = training_batch(dataset, step, batch_size=64, seed=0, rank=0, world_size=2)   # 32 rows
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import ImageFilter


@dataclass(frozen=True, eq=False)
class RowWeights:
    """How often training draws each row, relative to the others: float64 (rows,), positive."""

    values: NDArray[np.float64]

    @classmethod
    def from_table(cls, table: pa.Table, image_filter: ImageFilter | None) -> RowWeights | None:
        """The weights that a filter asks for.

        A group of n rows weighs n ** group_exponent in all, in equal shares; a row's share is then
        multiplied by the weight of its style. Conneau et al. 2020 ("Unsupervised cross-lingual
        representation learning at scale", section 3.1) draw languages so.

        Args:
            table: what `store.read_table` gives, with "group" if the filter has a
                group_exponent.
            image_filter: None weighs all rows the same.

        Returns:
            None if all rows weigh the same.
        """
        if image_filter is None:
            return None
        values = np.ones(len(table))
        if image_filter.group_exponent != 1:
            groups = table["group"].combine_chunks().dictionary_encode().indices.to_numpy()
            values = np.bincount(groups)[groups] ** (image_filter.group_exponent - 1.0)
        for style, weight in image_filter.style_weights.items():
            values[pc.equal(table["style"], style).to_numpy()] *= weight
        return None if (values == values[0]).all() else cls(values)


class Dataset(Protocol):
    """Rows that can be read in any order; with `weights`, some are drawn more often than others."""

    weights: RowWeights | None

    def __len__(self) -> int: ...

    def batch(
        self, rows: NDArray[np.int64], draws: NDArray[np.float64] | None
    ) -> dict[str, Tensor]:
        """The rows as tensors, each (rows, ...).

        Args:
            rows: int64, from 0 to len(self) - 1.
            draws: float64 (rows, 2) in [0, 1): the first picks a row's caption, the second its
                view. None takes the first caption and the first view.
        """


def global_rows(
    step: int, *, length: int, batch_size: int, seed: int, weights: RowWeights | None = None
) -> NDArray[np.int64]:
    """The rows of one step, int64 (batch_size,), the same on every rank."""
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    epochs = positions // length
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _order(seed, int(epoch), length, weights)[positions[here] % length]
    return rows


@lru_cache(maxsize=1)  # 8 bytes per row; shuffling at every step would take longer than the step
def _order(seed: int, epoch: int, length: int, weights: RowWeights | None) -> NDArray[np.int64]:
    """One epoch's rows, int64 (length,).

    Weights are met by systematic sampling (Madow 1949): a row is drawn as often as its share of
    the epoch says, rounded up or down.
    """
    rng = np.random.default_rng((seed, epoch))
    order: NDArray[np.int64] = rng.permutation(length)
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

    Beside what the dataset gives, "seeds" int64 (rows,) for `augment.Augment`.
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
) -> list[NDArray[np.int64]]:
    """This rank's share of the validation rows: evenly spread over the set, always the same ones.

    The batches' sizes differ by one row at most, so that no rank is left with an odd batch.
    """
    rows = spread(length, batch_size * num_batches)
    batches: list[NDArray[Any]] = np.array_split(rows, math.ceil(len(rows) / batch_size))
    return [batch[rank::world_size] for batch in batches]


def fewest_validation_rows(
    length: int, *, batch_size: int, num_batches: int, world_size: int
) -> int:
    """The rows that a rank has in its smallest validation batch; 0 if one goes without."""
    if not length:
        return 0
    shares = (
        validation_rows(length, batch_size=batch_size, num_batches=num_batches, rank=rank,
                        world_size=world_size)
        for rank in range(world_size)
    )  # fmt: skip
    return min(len(rows) for share in shares for rows in share)


def spread(length: int, count: int) -> NDArray[np.int64]:
    """Up to `count` of the rows 0 to length - 1, evenly spread: int64."""
    return np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)
