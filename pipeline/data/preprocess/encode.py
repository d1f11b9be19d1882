"""Pixels -> image tokens, captions -> caption states: computed once, with Ray Data actors.

Training a generator needs neither the tokenizer nor the language model at every step if their
outputs are stored. Each actor holds one of them, on a GPU where there is one. Results come in the
order of the pixels (or of the captions' lengths), whatever the number of actors, and are written as
they come: this process holds a few thousand rows at a time, and the text of all captions.

    encode_images(pixels, tokenizer, output, ...)    output/*.parquet: key, group, style, split,
                                                     captions, image_tokens (uint16, views x N)
    encode_captions(pixels, output, ...)             output/captions.json (texts), states.npy and
                                                     offsets.npy, in the same order

pipeline/training/datasets.py puts both together for training.

Shapes: N image tokens per image; a view is the image itself or an augmented variant of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from numpy.typing import NDArray

from pipeline.config import CaptionEncoderConfig, EncodeConfig
from pipeline.data.preprocess.store import fixed_width, parquet_files
from pipeline.data.preprocess.workers import TellingActor, worker_errors
from pipeline.errors import DataError
from pipeline.images.augment import Augment
from pipeline.images.mirror import may_mirror
from pipeline.images.pixels import to_float
from pipeline.progress import OnProgress, Progress
from pipeline.runtime import (
    autocast,
    choose_device,
    cluster_resources,
    quiet_actors,
    task_slots,
)
from pipeline.text.caption_encoder import load_caption_encoder
from pipeline.tokenizers._saved import load_tokenizer

LOG = logging.getLogger(__name__)
COPIED_COLUMNS = ("key", "group", "style", "split", "captions")
CAPTIONS_PER_CALL = 256  # of the encoder
ROWS_PER_GROUP = 4_096  # of a Parquet file


class _ImageEncoder:
    """Ray Data actor: pixels -> image tokens of each image and of num_views - 1 augmented variants.

    Args:
        tokenizer: its directory.
        config: number of views and their augmentation.
        image_size: pixels per side.
        seed: what a variant looks like depends on it, on the sample's key and on the view alone.
    """

    def __init__(self, tokenizer: str, config: EncodeConfig, image_size: int, seed: int) -> None:
        use_one_thread()
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
            seeds = torch.tensor([view_seed(key, view, self.seed) for key in keys])
            changed = self.augment(images, seeds=seeds, flippable=flippable)
            views.append(self._encode(changed))
        tokens = torch.stack(views, 1).cpu().numpy().astype(np.uint16)  # (B, views, N)
        column = pa.array([row.tobytes() for row in tokens], pa.binary())
        return batch.select(COPIED_COLUMNS).append_column("image_tokens", column)

    @torch.inference_mode()
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.device):
            encoded: torch.Tensor = self.tokenizer.encode(to_float(images))
        return encoded


class _CaptionEncoder:
    """Ray Data actor: captions -> the language model's states, float16 (tokens, width) each."""

    def __init__(self, config: CaptionEncoderConfig, cache: str) -> None:
        use_one_thread()
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


def use_one_thread() -> None:
    """One actor runs per CPU: threads within them would only compete for it."""
    torch.set_num_threads(1)


def view_seed(key: str, view: int, seed: int) -> int:
    """The seed of one view of one image, whatever batch it is in and however many actors run."""
    digest = hashlib.sha256(f"view:{seed}:{view}:{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def actor_options() -> dict[str, Any]:
    """As many actors at most as CPU-bound tasks truly run at once; with GPUs, one per GPU."""
    if gpus := int(cluster_resources().get("GPU", 0)):
        return {"num_gpus": 1, "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=gpus)}
    return {"num_cpus": 1, "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=task_slots())}


@contextmanager
def in_order() -> Iterator[None]:
    """Data sets that are made in this block give their results in the order of their inputs."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        yield


@worker_errors()
@quiet_actors()
def encode_images(
    pixels: Path,
    tokenizer: Path,
    output: Path,
    *,
    config: EncodeConfig,
    image_size: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> int:
    """Write the image tokens of every image, in the order of the pixels. Ray must be running.

    Args:
        pixels: the folder of Parquet files that `preprocess` wrote.
        tokenizer: the directory of a trained tokenizer.
        output: folder to write to, on a disk that every Ray node sees.
        config: number of views, their augmentation, images per batch.
        image_size: pixels per side.
        seed: of the augmentation.
        on_progress: called after every ROWS_PER_GROUP images.

    Returns:
        How many images were encoded.

    Raises:
        TesseraError: what a worker met that a user can correct, such as a damaged tokenizer.
    """
    total = sum(pq.read_metadata(path).num_rows for path in parquet_files(pixels))
    with in_order():
        data = ray.data.read_parquet(str(pixels), columns=[*COPIED_COLUMNS, "image"])
        encoded = data.map_batches(
            TellingActor,
            fn_constructor_args=(_ImageEncoder, str(tokenizer), config, image_size, seed),
            batch_format="pyarrow",
            batch_size=config.batch_size,
            **actor_options(),
        )
    output.mkdir(parents=True, exist_ok=True)
    done, writer = 0, None
    try:
        batches = encoded.iter_batches(batch_size=ROWS_PER_GROUP, batch_format="pyarrow")
        for batch in cast(Iterator[pa.Table], batches):
            if writer is None:
                writer = pq.ParquetWriter(output / "tokens.parquet", batch.schema)
            writer.write_table(batch)
            done += batch.num_rows
            _report(on_progress, done, total)
    finally:
        if writer is not None:
            writer.close()
    assert done == total, f"{done} of {total} images came back encoded"
    return done


@worker_errors()
@quiet_actors()
def encode_captions(
    pixels: Path,
    output: Path,
    *,
    config: CaptionEncoderConfig,
    cache: Path,
    on_progress: OnProgress | None = None,
) -> int:
    """Write the frozen encoder's states of every distinct caption. Ray must be running.

    Args:
        pixels: the folder of Parquet files that `preprocess` wrote.
        output: folder to write to.
        config: which encoder.
        cache: folder where a converted or downloaded encoder is kept.
        on_progress: called after every batch.

    Returns:
        How many captions were encoded.

    Raises:
        DataError: no image has a caption.
        TesseraError: what a worker met that a user can correct.
    """
    # by length, so that captions of about the same length share a batch
    texts = sorted(_distinct_texts(pixels), key=lambda text: (len(text), text))
    if not texts:
        raise DataError(
            f"none of the pictures in {pixels} has a caption, and a generator needs some"
        )
    load_caption_encoder(config, cache=cache)  # converts or downloads once, not in every actor
    with in_order():
        data = ray.data.from_arrow(
            [pa.table({"text": texts[i : i + 1024]}) for i in range(0, len(texts), 1024)]
        )
        encoded = data.map_batches(
            TellingActor,
            fn_constructor_args=(_CaptionEncoder, config, str(cache)),
            batch_format="pyarrow",
            batch_size=CAPTIONS_PER_CALL,
            **actor_options(),
        )
    output.mkdir(parents=True, exist_ok=True)
    offsets = _write_states(encoded, output / "states.npy", texts, on_progress)
    if cut := int((np.diff(offsets) >= config.max_tokens).sum()):
        LOG.warning(
            "%d of %d captions fill caption_encoder.max_tokens=%d; what is longer is cut there",
            cut, len(texts), config.max_tokens,
        )  # fmt: skip
    np.save(output / "offsets.npy", offsets)
    (output / "captions.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    return len(texts)


def _write_states(
    encoded: ray.data.Dataset, path: Path, texts: Sequence[str], on_progress: OnProgress | None
) -> NDArray[np.int64]:
    """Write the states of all captions one after another, as they come.

    Returns:
        int64 (captions + 1,): where each caption's states begin, and where the last ones end.
    """
    offsets, done, width = np.zeros(len(texts) + 1, np.int64), 0, 0
    with path.open("wb") as out:
        batches = encoded.iter_batches(batch_size=None, batch_format="pyarrow")
        for batch in cast(Iterator[pa.Table], batches):
            end = done + batch.num_rows
            assert batch["text"].to_pylist() == texts[done:end], "results come in order"
            lengths = batch["num_tokens"].to_numpy()
            offsets[done + 1 : end + 1] = offsets[done] + np.cumsum(lengths)
            rows = batch["states"].to_pylist()
            if not done:
                width = len(rows[0]) // (2 * int(lengths[0]))
                _write_header(out, 0, width)  # how many rows there are is known at the end
            out.writelines(rows)
            done = end
            _report(on_progress, done, len(texts))
        assert done == len(texts), f"{done} of {len(texts)} captions came back encoded"
        out.seek(0)
        _write_header(out, int(offsets[-1]), width)
    return offsets


def _write_header(out: BinaryIO, rows: int, width: int) -> None:
    """The header of a float16 .npy file; numpy pads it to one length, whatever `rows` is."""
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
    )


def _distinct_texts(pixels: Path) -> set[str]:
    """The text of every caption, read a few thousand rows at a time."""
    found: set[str] = set()
    for path in parquet_files(pixels):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(ROWS_PER_GROUP, columns=["captions"]):
                found.update(batch.column(0).flatten().field("text").to_pylist())
    return found


def _report(on_progress: OnProgress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress(share=done / max(1, total), step=done))
