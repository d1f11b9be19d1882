"""Asking a generator for an evaluation set's images, and laying images side by side.

    requests = requests_for(image_set, "en", generator.styles, seed=0)
    images, seconds = generate_images(generator, requests, batch_size=50)
    columns = {"real": image_set.images, "generated": images}
    comparison_grid(columns, image_set.captions["en"]).save(path)

Shapes: N images, S pixels per side.
"""

from __future__ import annotations

import io
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from pipeline.contracts import GenerationRequest, ImageGenerator, ImageTokenizer
from pipeline.evaluation.eval_set import ImageSet
from pipeline.evaluation.measured import Measured
from pipeline.images.grid import grid
from pipeline.images.pixels import to_float, to_uint8

GRID_ROWS = 12


def requests_for(
    image_set: ImageSet,
    language: str,
    styles: Collection[str],
    *,
    seed: int,
    guidance_scale: float | None = None,
) -> list[GenerationRequest]:
    """One request per image, seeded seed, seed + 1, ...

    Args:
        styles: the generator's; requests name no style if the set's is not among them.
    """
    style = image_set.style if image_set.style in styles else None
    return [
        GenerationRequest(prompt, seed=seed + i, style=style, guidance_scale=guidance_scale)
        for i, prompt in enumerate(image_set.captions[language][: len(image_set)])
    ]


def generate_images(
    generator: ImageGenerator, requests: Sequence[GenerationRequest], batch_size: int
) -> tuple[Tensor, list[float]]:
    """The images, uint8 (N, 3, S, S) on the CPU, and for each its share of its batch's seconds."""
    batches, seconds = [], []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        started = time.perf_counter()
        batches.append(generator.generate(batch).cpu())
        seconds.extend([(time.perf_counter() - started) / len(batch)] * len(batch))
    return torch.cat(batches), seconds


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor, batch_size: int) -> Tensor:
    """uint8 (N, 3, S, S) -> image tokens -> uint8 (N, 3, S, S)."""
    batches = torch.split(images, batch_size)
    return torch.cat([to_uint8(tokenizer.decode(tokenizer.encode(to_float(b)))) for b in batches])


def samples_image(measured: Mapping[str, Measured], slice_name: str) -> Image.Image:
    """A slice's first images, one row per caption, one column per subject.

    Args:
        measured: by the column's title; of the same captions.
        slice_name: as "unseen" (pipeline/evaluation/measured.py).
    """
    columns, captions = {}, list[str]()
    for title, subject in measured.items():
        rows = subject.rows.filter(pa.array(subject.mask(slice_name))).slice(0, GRID_ROWS)
        columns[title] = torch.stack([decode_png(image) for image in rows["image"].to_pylist()])
        captions = rows["caption"].to_pylist()
    return comparison_grid(columns, captions)


def decode_png(file: bytes) -> Tensor:
    """A PNG file of Tessera's own -> uint8 (3, H, W)."""
    with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
        array = np.asarray(image.convert("RGB"))
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def comparison_grid(
    columns: Mapping[str, Tensor], captions: Sequence[str], *, scale: int = 2
) -> Image.Image:
    """One row per caption, one column per title.

    Args:
        columns: uint8 (N, 3, S, S) by title.
        captions: N.
        scale: how many times larger each image is shown.
    """
    images = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    return grid(
        images, len(columns), row_labels=captions, column_labels=tuple(columns), scale=scale
    )
