"""Pixels and captions -> image tokens and caption states, once, with Ray Data actors.

    encode_pictures(pixels, tokenizer, output, ...)   output/*.parquet: key, group, style, split,
                                                      captions, image_tokens (uint16, views x N)
    encode_captions(pixels, output, ...)              output/states.npy, offsets.npy, captions.json

`captioned_dataset` puts both together for training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from torch import Tensor

from pipeline.augment import Augment
from pipeline.bundle import load_tokenizer
from pipeline.config import CaptionEncoderConfig, EncodeConfig, PictureFilter
from pipeline.feed import (
    CaptionedDataset,
    CaptionIds,
    CaptionStates,
    fixed_width,
    read_table,
    spread,
)  # fmt: skip
from pipeline.images import to_float
from pipeline.mirror import may_mirror
from pipeline.models._captions import CaptionTokenizer
from pipeline.pixel_store import read_pixels
from pipeline.progress import OnProgress, Progress
from pipeline.runtime import autocast, available_cpus, choose_device
from pipeline.text import load_caption_encoder

KEPT = ("key", "group", "style", "split", "captions")
CAPTIONS_A_CALL = 256


class _PictureEncoder:
    """Ray Data actor: pixels -> image tokens of the picture and of `num_views - 1` variations."""

    def __init__(self, tokenizer: str, config: EncodeConfig, image_size: int, seed: int) -> None:
        _one_thread()
        self.device = choose_device()
        self.tokenizer = load_tokenizer(Path(tokenizer)).to(self.device)
        self.config, self.image_size, self.seed = config, image_size, seed
        self.augment = Augment(config.augment).to(self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shape = (3, self.image_size, self.image_size)
        images = torch.from_numpy(fixed_width(batch["image"], np.uint8, shape).copy())
        images = images.to(self.device)
        keys = batch["key"].to_pylist()
        texts = [[c["text"] for c in captions] for captions in batch["captions"].to_pylist()]
        flippable = torch.tensor([may_mirror(captions) for captions in texts])
        views = [self._encode(images)]
        for view in range(1, self.config.num_views):
            seeds = torch.tensor([_view_seed(key, view, self.seed) for key in keys])
            changed = self.augment(images, seeds=seeds, flippable=flippable)
            views.append(self._encode(changed))
        tokens = torch.stack(views, 1).cpu().numpy().astype(np.uint16)  # (B, views, N)
        column = pa.array([row.tobytes() for row in tokens], pa.binary())
        return batch.select(KEPT).append_column("image_tokens", column)

    @torch.inference_mode()
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.device):
            encoded: torch.Tensor = self.tokenizer.encode(to_float(images))
        return encoded


class _CaptionEncoder:
    """Ray Data actor: captions -> the frozen encoder's states."""

    def __init__(self, config: CaptionEncoderConfig, cache: str) -> None:
        _one_thread()
        self.encoder = load_caption_encoder(config, cache=Path(cache), device=str(choose_device()))

    def __call__(self, batch: pa.Table) -> pa.Table:
        states, mask = self.encoder.encode(batch["text"].to_pylist())
        lengths = mask.sum(1).tolist()
        rows = [s[:n].half().cpu().numpy() for s, n in zip(states, lengths, strict=True)]
        return pa.table(
            {
                "text": batch["text"],
                "states": pa.array([r.tobytes() for r in rows], pa.binary()),
                "num_tokens": pa.array(lengths, pa.int32()),
            }
        )


def _one_thread() -> None:
    """Actors run beside each other, one a CPU: threads within them would only fight."""
    torch.set_num_threads(1)


def _view_seed(key: str, view: int, seed: int) -> int:
    """A picture's own: whatever batch it is in, and however many actors there are."""
    digest = hashlib.sha256(f"view:{seed}:{view}:{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _actor_options() -> dict[str, Any]:
    """As many actors as there are real CPUs, or one a GPU."""
    if torch.cuda.is_available():
        return {"num_gpus": 1, "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=8)}
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=available_cpus())
    return {"num_cpus": 1, "compute": pool}


def encode_pictures(
    pixels: Path,
    tokenizer: Path,
    output: Path,
    *,
    config: EncodeConfig,
    image_size: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> int:
    """Write the image tokens of every accepted picture, rows in order of their keys.

    Returns:
        How many pictures.
    """
    total = pq.read_table(pixels, columns=["key"]).num_rows
    data = ray.data.read_parquet(str(pixels), columns=[*KEPT, "image"])
    encoded = data.map_batches(
        _PictureEncoder,
        fn_constructor_args=(str(tokenizer), config, image_size, seed),
        batch_format="pyarrow",
        batch_size=config.batch_size,
        **_actor_options(),
    )
    tables, done = [], 0
    for batch in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        tables.append(batch)
        done += batch.num_rows
        _tell(on_progress, done, total)
    table = pa.concat_tables(tables).sort_by("key")
    output.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, output / "tokens.parquet", row_group_size=4096)
    return table.num_rows


def encode_captions(
    pixels: Path,
    output: Path,
    *,
    config: CaptionEncoderConfig,
    cache: Path,
    on_progress: OnProgress | None = None,
) -> int:
    """Write the frozen encoder's states of every distinct caption.

    Returns:
        How many captions.
    """
    texts = sorted(set(_texts(pq.read_table(pixels, columns=["captions"]))))
    load_caption_encoder(config, cache=cache)  # converts or downloads once, not in every actor
    # longest last, so that captions of like length share a batch
    order = sorted(texts, key=len)
    data = ray.data.from_arrow(
        [pa.table({"text": order[i : i + 1024]}) for i in range(0, len(order), 1024)]
    )
    encoded = data.map_batches(
        _CaptionEncoder,
        fn_constructor_args=(config, str(cache)),
        batch_format="pyarrow",
        batch_size=CAPTIONS_A_CALL,
        **_actor_options(),
    )
    found: dict[str, bytes] = {}
    lengths: dict[str, int] = {}
    for batch in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            found[row["text"]], lengths[row["text"]] = row["states"], row["num_tokens"]
        _tell(on_progress, len(found), len(texts))
    output.mkdir(parents=True, exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum([lengths[t] for t in texts])]).astype(np.int64)
    states = np.frombuffer(b"".join(found[t] for t in texts), np.float16)
    np.save(output / "states.npy", states.reshape(int(offsets[-1]), -1))
    np.save(output / "offsets.npy", offsets)
    (output / "captions.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    return len(texts)


def _texts(table: pa.Table) -> Iterator[str]:
    for captions in table["captions"].to_pylist():
        for caption in captions:
            yield caption["text"]


def _tell(on_progress: OnProgress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress(share=done / max(1, total), step=done))


def captioned_dataset(
    rows: Path,
    captions: Path,
    *,
    split: str | Sequence[str],
    styles: Sequence[str],
    max_tokens: int,
    only: PictureFilter | None = None,
    num_tokens: int | None = None,
    image_size: int | None = None,
    caption_tokenizer: CaptionTokenizer | None = None,
) -> CaptionedDataset:
    """Pictures with their captions' states, or token ids, for training.

    Args:
        rows: `encode_pictures`' output (give num_tokens) or preprocess' pixels (give image_size).
        captions: `encode_captions`' output.
        split: "train", "validation" or "test", or several of them.
        styles: names by style id.
        caption_tokenizer: gives captions as its token ids instead of the encoder's states.

    Raises:
        DataError: no picture is left after filtering.
    """
    columns = [*KEPT, "image_tokens"] if num_tokens else KEPT
    table = read_table(rows, split=split, only=only, columns=columns, captioned=True)
    texts = json.loads((captions / "captions.json").read_text(encoding="utf-8"))
    ids = {text: i for i, text in enumerate(texts)}
    said = [[caption["text"] for caption in row] for row in table["captions"].to_pylist()]
    caption_ids = [np.array([ids[text] for text in row], np.int64) for row in said]
    groups = table["group"].to_pylist()
    group_ids = {group: i for i, group in enumerate(sorted(set(groups)))}
    if num_tokens:
        flat = fixed_width(table["image_tokens"], np.uint16, (-1, num_tokens))
        arrays, viewed = {"image_tokens": flat}, frozenset({"image_tokens"})
    else:
        assert image_size is not None
        pixels = read_pixels(rows, table["place"].to_numpy(), image_size=image_size)
        flippable = np.array([may_mirror(row) for row in said])
        arrays, viewed = {"images": pixels, "flippable": flippable}, frozenset()
    return CaptionedDataset(
        arrays=arrays,
        viewed=viewed,
        caption_ids=caption_ids,
        captions=(
            CaptionStates(captions, max_tokens=max_tokens)
            if caption_tokenizer is None
            else CaptionIds(texts, caption_tokenizer)
        ),
        style=np.array([styles.index(s) for s in table["style"].to_pylist()], np.int64),
        group=np.array([group_ids[g] for g in groups], np.int64),
    )


def sample_captions(dataset: CaptionedDataset, count: int = 1_024) -> tuple[Tensor, Tensor]:
    """States float (count, L, C) and mask bool (count, L) of captions spread over the rows."""
    batch = dataset.batch(spread(len(dataset), count), None)
    return batch["caption_states"], batch["caption_mask"]
