"""Asking a generator for an evaluation set's images, and laying images side by side.

    requests = requests_for(image_set, "en", generator.styles, seed=0)
    images, seconds = generate_images(generator, requests, batch_size=50)
    columns = {"real": image_set.images, "generated": images}
    comparison_grid(columns, image_set.captions["en"]).save(path)

Shapes: N images, S pixels per side.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from pipeline.contracts import GenerationRequest, ImageGenerator, ImageTokenizer
from pipeline.evaluation.eval_set import ImageSet
from pipeline.images.grid import grid
from pipeline.images.pixels import resize_batch, to_float, to_uint8

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
    generator: ImageGenerator,
    requests: Sequence[GenerationRequest],
    batch_size: int,
    *,
    image_size: int | None = None,
) -> tuple[Tensor, list[float]]:
    """The images, uint8 (N, 3, S, S) on the CPU, and for each its share of its batch's seconds.

    Args:
        image_size: S, to which images are resized; None leaves them in the generator's size.
    """
    batches, seconds = [], []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        started = time.perf_counter()
        batches.append(generator.generate(batch).cpu())
        seconds.extend([(time.perf_counter() - started) / len(batch)] * len(batch))
    images = torch.cat(batches)
    return images if image_size is None else resize_batch(images, image_size), seconds


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor, batch_size: int) -> Tensor:
    """uint8 (N, 3, S, S) -> image tokens -> uint8 (N, 3, S, S)."""
    batches = torch.split(images, batch_size)
    return torch.cat([to_uint8(tokenizer.decode(tokenizer.encode(to_float(b)))) for b in batches])


def image_grid(
    image_set: ImageSet, generated: Mapping[str, Tensor], tokenizer: ImageTokenizer | None = None
) -> Image.Image:
    """The set's first images: real | reconstructed from tokens | generated, one column per
    language."""
    rows = min(GRID_ROWS, *(len(images) for images in generated.values()))
    real = image_set.images[:rows]
    columns = {"real": real}
    if tokenizer is not None:
        columns["tokens"] = reconstruct(tokenizer, real, rows)
    columns |= {language: images[:rows] for language, images in generated.items()}
    captions = next(iter(image_set.captions.values()))
    return comparison_grid(columns, captions[: len(real)])


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
