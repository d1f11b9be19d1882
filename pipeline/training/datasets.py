"""Data sets for training: images alone, or images (pixels or image tokens) with captions.

They read what preprocessing (pixels) and encoding (image tokens, caption states) wrote, mapped from
disk where it is large, and give any rows as a batch of tensors. Which rows a step sees is decided
by pipeline/training/feed.py, whose protocol `Dataset` they implement.

    dataset = ImageDataset.from_parquet(pixels, image_size=64, split="train")
    dataset.batch(np.array([7, 3]), None)        # {"images": uint8 (2, 3, 64, 64)}

Shapes: B rows, L = max_tokens caption tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import ImageFilter
from pipeline.contracts import CaptionTokenizer
from pipeline.data.preprocess.store import MappedRows, read_pixels, read_table, read_tokens
from pipeline.images.mirror import may_mirror
from pipeline.training.feed import RowWeights, spread

ROWS_AT_ONCE = 4_096  # whose captions are Python objects at one time


class ImageDataset:
    """Images alone, for training without captions.

    Batches: {"images": uint8 (B, 3, H, W)}.
    """

    def __init__(
        self, images: NDArray[np.uint8] | MappedRows, *, weights: RowWeights | None = None
    ) -> None:
        self.images, self.weights = images, weights

    @classmethod
    def from_parquet(
        cls,
        directory: Path,
        *,
        image_size: int,
        split: str,
        image_filter: ImageFilter | None = None,
    ) -> ImageDataset:
        """The accepted images of one split, mapped from disk where they are many.

        Raises:
            DataError: as `read_table` and `read_pixels`.
        """
        grouped = image_filter is not None and image_filter.group_exponent != 1
        columns = ["group"] if grouped else []  # a text per row: read only if it is needed
        table = read_table(directory, split=split, image_filter=image_filter, columns=columns)
        images = read_pixels(directory, table["row_index"].to_numpy(), image_size=image_size)
        return cls(images, weights=RowWeights.from_table(table, image_filter))

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, rows: NDArray[np.int64], draws: NDArray[np.float64] | None
    ) -> dict[str, Tensor]:
        """See feed.Dataset.batch."""
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
        """Numbers per token."""
        return int(self.states.shape[1])

    def batch(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """{"caption_states": float16 (B, L, width), "caption_mask": bool (B, L)}."""
        states = np.zeros((len(ids), self.max_tokens, self.width), np.float16)
        mask = np.zeros((len(ids), self.max_tokens), bool)
        for row, caption in enumerate(ids):
            tokens = self.states[self.offsets[caption] : self.offsets[caption + 1]]
            states[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return {"caption_states": torch.from_numpy(states), "caption_mask": torch.from_numpy(mask)}


class CaptionIds:
    """Every distinct caption as token ids.

    Args:
        texts: the captions.
        tokenize: texts -> ids int64 (texts, L), mask bool (texts, L).
    """

    def __init__(
        self, texts: Sequence[str], tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    ) -> None:
        self.ids, self.mask = tokenize(texts)

    def batch(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """{"caption_ids": int64 (B, L), "caption_mask": bool (B, L)}."""
        return {"caption_ids": self.ids[ids], "caption_mask": self.mask[ids]}


class RaggedRows:
    """One array per row, of unequal lengths, held without an object for each.

    Args:
        values: the arrays one after another.
        lengths: of each array.
    """

    def __init__(self, values: NDArray[Any], lengths: NDArray[Any]) -> None:
        self.values = values
        self.ends = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.ends[row] : self.ends[row + 1]]


class CaptionedDataset:
    """Images (pixels or image tokens), each with one of its captions.

    Batches: `arrays` by name; "caption_states" or "caption_ids", and "caption_mask"; "style" and
    "group" int64 (B,). An array "flippable", bool (rows,), says which images may be mirrored by
    `augment.Augment`.

    Args:
        arrays: by name, (rows, ...), or (rows, views, ...) if the name is in `with_views`.
        with_views: names of the arrays of which a batch takes one view per row.
        caption_ids: per row, the numbers of its captions in `captions`.
        captions: what stands for a caption in a batch.
        style: int64 (rows,).
        group: int64 (rows,); images of one group show the same thing.
        weights: how often training draws each row.
    """

    def __init__(
        self,
        *,
        arrays: Mapping[str, NDArray[Any] | MappedRows],
        with_views: frozenset[str],
        caption_ids: Sequence[NDArray[np.int64]] | RaggedRows,
        captions: CaptionStates | CaptionIds,
        style: NDArray[np.int64],
        group: NDArray[np.int64],
        weights: RowWeights | None = None,
    ) -> None:
        self.arrays, self.with_views = dict(arrays), with_views
        self.caption_ids, self.captions = caption_ids, captions
        self.style, self.group, self.weights = style, group, weights

    def __len__(self) -> int:
        return len(self.caption_ids)

    def batch(
        self, rows: NDArray[np.int64], draws: NDArray[np.float64] | None
    ) -> dict[str, Tensor]:
        """See feed.Dataset.batch."""
        draws = np.zeros((len(rows), 2)) if draws is None else draws
        choices = [self.caption_ids[row] for row in rows]
        chosen = np.array(
            [ids[int(d * len(ids))] for ids, d in zip(choices, draws[:, 0], strict=True)]
        )
        batch = self.captions.batch(chosen)
        for name, array in self.arrays.items():
            if name in self.with_views:
                picked = array[rows, (draws[:, 1] * array.shape[1]).astype(int)]
            else:
                picked = array[rows]
            if picked.dtype == np.uint16:
                picked = picked.astype(np.int64)
            batch[name] = torch.from_numpy(np.ascontiguousarray(picked))
        batch["style"] = torch.from_numpy(self.style[rows])
        batch["group"] = torch.from_numpy(self.group[rows])
        return batch


def captioned_dataset(
    rows: Path,
    captions: Path,
    *,
    split: str | Sequence[str],
    styles: Sequence[str],
    max_tokens: int,
    image_filter: ImageFilter | None = None,
    num_tokens: int | None = None,
    image_size: int | None = None,
    caption_tokenizer: CaptionTokenizer | None = None,
) -> CaptionedDataset:
    """Images with their captions' states, or with their captions' token ids.

    Args:
        rows: the output of `encode_images` (give num_tokens) or the pixels that `preprocess` wrote
            (give image_size).
        captions: the output of `encode_captions`.
        split: "train", "validation" or "test", or several of them.
        styles: names by style id.
        max_tokens: of a caption's states.
        image_filter: which styles to keep, and how often each row is drawn.
        num_tokens: image tokens per image.
        image_size: pixels per side.
        caption_tokenizer: gives captions as its token ids instead of the encoder's states.

    Raises:
        DataError: no image is left after filtering.
    """
    table = read_table(
        rows,
        split=split,
        image_filter=image_filter,
        columns=["group", "captions"],
        captioned=True,
    )
    indices = table["row_index"].to_numpy()
    texts = json.loads((captions / "captions.json").read_text(encoding="utf-8"))
    arrays: dict[str, NDArray[Any] | MappedRows]
    if num_tokens:
        arrays = {"image_tokens": read_tokens(rows, indices, num_tokens=num_tokens)}
        with_views = frozenset({"image_tokens"})
    else:
        assert image_size is not None, "either num_tokens or image_size is given"
        flippable = map(may_mirror, _texts_by_row(table["captions"]))
        arrays = {
            "images": read_pixels(rows, indices, image_size=image_size),
            "flippable": np.fromiter(flippable, bool, len(table)),
        }
        with_views = frozenset()
    return CaptionedDataset(
        arrays=arrays,
        with_views=with_views,
        caption_ids=_caption_ids(table["captions"], texts),
        captions=(
            CaptionStates(captions, max_tokens=max_tokens)
            if caption_tokenizer is None
            else CaptionIds(texts, caption_tokenizer)
        ),
        style=_positions(table["style"], styles),
        group=pc.rank(table["group"], tiebreaker="dense").to_numpy().astype(np.int64) - 1,
        weights=RowWeights.from_table(table, image_filter),
    )


def sample_captions(dataset: CaptionedDataset, count: int = 1_024) -> tuple[Tensor, Tensor]:
    """Up to `count` rows' captions, evenly spread over the rows: states float16 (count, L, width)
    and mask bool (count, L)."""
    batch = dataset.batch(spread(len(dataset), count), None)
    return batch["caption_states"], batch["caption_mask"]


def _texts_by_row(captions: pa.ChunkedArray) -> Iterator[list[str]]:
    """Every row's caption texts; few rows are Python objects at one time."""
    for start in range(0, len(captions), ROWS_AT_ONCE):
        for row in captions.slice(start, ROWS_AT_ONCE).to_pylist():
            yield [caption["text"] for caption in row]


def _caption_ids(captions: pa.ChunkedArray, texts: Sequence[str]) -> RaggedRows:
    """By row, the positions of its captions in `texts`."""
    flat = [chunk.flatten().field("text") for chunk in captions.chunks]
    lengths = pc.list_value_length(captions).to_numpy()
    return RaggedRows(_positions(pa.chunked_array(flat, pa.string()), texts), lengths)


def _positions(column: pa.ChunkedArray, names: Sequence[str]) -> NDArray[np.int64]:
    """The positions of a column's values in `names`, int64."""
    found = pc.index_in(column, pa.array(names, pa.string()))
    assert not found.null_count, "the step before wrote every one of them"
    positions: NDArray[np.int64] = found.to_numpy().astype(np.int64)
    return positions
