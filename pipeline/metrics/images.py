"""Images against images, by their pixels: how alike, how sharp, and whether they are copies.

    sharpness(generated, real)                 # 1.0: as sharp as the real image of its caption
    distances, indices = nearest_neighbours(generated, training)
    psnr(reconstructed, real), ssim(reconstructed, real)

Shapes: N images, M reference images, H x W pixels, uint8 with 3 channels (RGB) first.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import (
    image_gradients,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from pipeline.metrics.bootstrap import Array

# ---- How alike -----------------------------------------------------------------------------------


def psnr(images: Tensor, targets: Tensor) -> Array:
    """Peak signal-to-noise ratio of each pair in dB: uint8 (N, 3, H, W) twice -> (N,)."""
    values = peak_signal_noise_ratio(
        images.float(), targets.float(), data_range=255.0, dim=(1, 2, 3), reduction="none"
    )
    return _array(values)


def ssim(images: Tensor, targets: Tensor) -> Array:
    """Structural similarity of each pair, at most 1: uint8 (N, 3, H, W) twice -> (N,).

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", equation 13.
    """
    values = structural_similarity_index_measure(
        images.float(), targets.float(), data_range=255.0, reduction="none"
    )
    assert isinstance(values, Tensor), "without the similarity map, it is no pair"
    return _array(values)


# ---- How sharp -----------------------------------------------------------------------------------


def sharpness(images: Tensor, real: Tensor) -> Array:
    """How near each image's gradient energy g is to that of the real image of its caption, r:
    exp(-|log(g / r)|), which is min(g, r) / max(g, r); 1 is as sharp, blur and noise both lose.

    A pair of plain images has 1. Blur and noise at once can balance, and two drawings of one
    concept differ in detail: a new drawing by the real artist does not reach 1. `gradient_energy`
    tells blur (less than real) from noise (more).

    Args:
        images, real: uint8 (N, 3, H, W), row i of the same caption.

    Returns:
        0 to 1, (N,).

    Raises:
        ValueError: the two differ in shape.
    """
    if images.shape != real.shape:
        raise ValueError(f"images differ in shape: {[*images.shape]} and {[*real.shape]}")
    energies = np.stack([gradient_energy(images), gradient_energy(real)])
    less, more = energies.min(0), energies.max(0)
    score: Array = np.divide(less, more, out=np.ones_like(more), where=more > 0)
    return score


def gradient_energy(images: Tensor) -> Array:
    """The root mean square of each image's gradient, per pixel and channel: (N,), 0 to 255 sqrt(2).

    The gradient is the differences to the next pixel below and right. Its square, unlike its
    magnitude, falls when the same edge gets wider. An ideal edge has as much of it in every octave
    of frequencies, so that it is not a measure of the finest details alone.

    Args:
        images: uint8 (N, 3, H, W).
    """
    vertical, horizontal = image_gradients(images.double())
    return _array((vertical.square() + horizontal.square()).mean((1, 2, 3)).sqrt())


# ---- Copies of training images -------------------------------------------------------------------


def nearest_neighbours(
    images: Tensor, reference: Tensor, *, chunk: int = 4_096
) -> tuple[Array, NDArray[np.int64]]:
    """The distance of each image to the nearest of `reference`, 0 to 1, and the index of that one.

    The distance is the root mean square difference at a quarter of the resolution, where a blurred
    copy lies within 0.02 of its original and the nearest neighbour of a new icon beyond 0.04.
    (ImageNet features do not tell the two apart: held-out icons and copies overlap in cosine
    similarity.)

    Args:
        images, reference: uint8 (N, 3, H, W) and (M, 3, H, W), M >= 1.
        chunk: reference images in memory at once beside their bytes.

    Returns:
        (N,) and int64 (N,).
    """
    queries = _quarter(images)
    best = torch.full((len(images),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(images), dtype=torch.int64)
    for start in range(0, len(reference), chunk):
        distances, found = torch.cdist(queries, _quarter(reference[start : start + chunk])).min(1)
        nearer = distances < best
        best = torch.where(nearer, distances, best)
        index = torch.where(nearer, found + start, index)
    indices: NDArray[np.int64] = index.numpy()
    return _array(best / queries.shape[1] ** 0.5), indices


def _quarter(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float64 (N, 3 * H/4 * W/4), 0 to 1."""
    return F.avg_pool2d(images.float() / 255, 4).flatten(1).double()


def _array(values: Tensor) -> Array:
    array: Array = values.double().numpy()
    return array
