"""Asking a generator for an evaluation set's pictures, and laying pictures side by side.

    requests = requests_for(pictures, "en", generator.styles, seed=0)
    images, seconds = draw(generator, requests, batch_size=50)
    comparison_grid({"real": pictures.images, "drawn": images}, pictures.captions["en"]).save(path)

Shapes: N pictures, S pixels a side.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from pipeline.contracts import GenerationRequest, ImageGenerator, ImageTokenizer
from pipeline.evalset import ImageSet
from pipeline.image_grid import grid
from pipeline.images import resize_batch, to_float, to_uint8

GRID_ROWS = 12


def requests_for(
    pictures: ImageSet,
    language: str,
    styles: Collection[str],
    *,
    seed: int,
    scale: float | None = None,
) -> list[GenerationRequest]:
    """One request a picture, seeded seed, seed + 1, ...; a style the generator lacks stays open."""
    style = pictures.style if pictures.style in styles else None
    return [
        GenerationRequest(prompt, seed=seed + i, style=style, guidance_scale=scale)
        for i, prompt in enumerate(pictures.captions[language][: len(pictures)])
    ]


def draw(
    generator: ImageGenerator,
    requests: Sequence[GenerationRequest],
    batch_size: int,
    *,
    image_size: int | None = None,
) -> tuple[Tensor, list[float]]:
    """Pictures uint8 (N, 3, S, S), and for each its share of its batch's seconds.

    `image_size` is the S they are brought to; None leaves them as they are drawn.
    """
    drawn, seconds = [], []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        started = time.perf_counter()
        drawn.append(generator.generate(batch).cpu())
        seconds.extend([(time.perf_counter() - started) / len(batch)] * len(batch))
    pictures = torch.cat(drawn)
    return pictures if image_size is None else resize_batch(pictures, image_size), seconds


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor, batch_size: int) -> Tensor:
    """uint8 (N, 3, H, W) to image tokens and back."""
    batches = images.split(batch_size)
    return torch.cat([to_uint8(tokenizer.decode(tokenizer.encode(to_float(b)))) for b in batches])


def image_grid(
    pictures: ImageSet, drawn: Mapping[str, Tensor], tokenizer: ImageTokenizer | None = None
) -> Image.Image:
    """The set's first pictures: real | as image tokens | drawn, a column a language."""
    rows = min(GRID_ROWS, *(len(images) for images in drawn.values()))
    real = pictures.images[:rows]
    columns = {"real": real}
    if tokenizer is not None:
        columns["tokens"] = reconstruct(tokenizer, real, rows)
    columns |= {language: images[:rows] for language, images in drawn.items()}
    captions = next(iter(pictures.captions.values()))
    return comparison_grid(columns, captions[: len(real)])


def comparison_grid(
    columns: Mapping[str, Tensor], captions: Sequence[str], *, scale: int = 2
) -> Image.Image:
    """The same captions side by side: one column a title, uint8 (N, 3, H, W) each; N rows."""
    images = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    return grid(
        images, len(columns), row_labels=captions, column_labels=tuple(columns), scale=scale
    )
