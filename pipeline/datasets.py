"""Data sets for training: images alone, or images (pixels or image tokens) with captions.

They read what preprocessing (pixels) and encoding (image tokens, caption states) wrote, mapped from
disk where it is large, and give batches of any rows as tensors. `pipeline.feed` decides which rows.

    dataset = ImageDataset.from_parquet(pixels, image_size=64, split="train")
    dataset.batch(np.array([7, 3]), None)        # {"images": uint8 (2, 3, 64, 64)}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.config import ImageFilter
from pipeline.feed import RowWeights, spread
from pipeline.mirror import may_mirror
from pipeline.models._captions import CaptionTokenizer
from pipeline.pixel_store import MappedRows, read_pixels, read_table, read_tokens

ROWS_AT_ONCE = 4_096  # whose captions are Python objects at a time


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


def captioned_dataset(
    rows: Path,
    captions: Path,
    *,
    split: str | Sequence[str],
    styles: Sequence[str],
    max_tokens: int,
    only: ImageFilter | None = None,
    num_tokens: int | None = None,
    image_size: int | None = None,
    caption_tokenizer: CaptionTokenizer | None = None,
) -> CaptionedDataset:
    """Pictures with their captions' states, or token ids, for training.

    Args:
        rows: `encode_images`' output (give num_tokens) or preprocess' pixels (give image_size).
        captions: `encode_captions`' output.
        split: "train", "validation" or "test", or several of them.
        styles: names by style id.
        caption_tokenizer: gives captions as its token ids instead of the encoder's states.

    Raises:
        DataError: no picture is left after filtering.
    """
    table = read_table(rows, split=split, only=only, columns=["group", "captions"], captioned=True)
    places = table["place"].to_numpy()
    texts = json.loads((captions / "captions.json").read_text(encoding="utf-8"))
    if num_tokens:
        arrays = {"image_tokens": read_tokens(rows, places, num_tokens=num_tokens)}
        viewed = frozenset({"image_tokens"})
    else:
        assert image_size is not None
        flippable = np.fromiter(map(may_mirror, _said(table["captions"])), bool, len(table))
        pixels = read_pixels(rows, places, image_size=image_size)
        arrays, viewed = {"images": pixels, "flippable": flippable}, frozenset()
    return CaptionedDataset(
        arrays=arrays,
        viewed=viewed,
        caption_ids=_caption_ids(table["captions"], texts),
        captions=(
            CaptionStates(captions, max_tokens=max_tokens)
            if caption_tokenizer is None
            else CaptionIds(texts, caption_tokenizer)
        ),
        style=_known(table["style"], styles),
        group=pc.rank(table["group"], tiebreaker="dense").to_numpy().astype(np.int64) - 1,
        weights=RowWeights.of(table, only),
    )


def _said(captions: pa.ChunkedArray) -> Iterator[list[str]]:
    """Every row's texts, a few rows in memory at a time."""
    for start in range(0, len(captions), ROWS_AT_ONCE):
        for row in captions.slice(start, ROWS_AT_ONCE).to_pylist():
            yield [caption["text"] for caption in row]


def _caption_ids(captions: pa.ChunkedArray, texts: Sequence[str]) -> Ragged:
    """Places in `texts` of every row's captions."""
    said = [chunk.flatten().field("text") for chunk in captions.chunks]
    lengths = pc.list_value_length(captions).to_numpy()
    return Ragged(_known(pa.chunked_array(said, pa.string()), texts), lengths)


def _known(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """The places in `names` of a column's values, int64."""
    found = pc.index_in(column, pa.array(names, pa.string()))
    assert not found.null_count, "the step before named every one"
    return found.to_numpy().astype(np.int64)


def sample_captions(dataset: CaptionedDataset, count: int = 1_024) -> tuple[Tensor, Tensor]:
    """States float (count, L, C) and mask bool (count, L) of captions spread over the rows."""
    batch = dataset.batch(spread(len(dataset), count), None)
    return batch["caption_states"], batch["caption_mask"]
