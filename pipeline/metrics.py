"""The numbers that evaluation is made of, as pure functions of arrays.

Evaluation sets are small (hundreds of images), so the leading metric is the Kernel Inception
Distance (KID), whose estimate is unbiased at any size, and every number comes with an interval:
95 %, bootstrapped over images by the percentile method.

    real, drawn = features(real_images), features(drawn_images)
    kid_interval(real, drawn, bootstrap=1_000, seed=0)
    hits = retrieval_at_1(aligner.embed_images(drawn_images), aligner.embed_captions(states, mask))
    mean_interval(hits, bootstrap=1_000, seed=0)

Shapes: N images of a set, M of another or M captions, D features, E embedding dimensions, R
bootstrap resamples.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from pipeline.contracts import Interval

Array = NDArray[np.float64]

# ---- Bootstrap intervals -------------------------------------------------------------------------


def resample(n: int, *, bootstrap: int, seed: int) -> Array:
    """How often each of n images occurs in each resample: (R, n), whose rows sum to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), bootstrap).astype(float)


def interval(value: float, resampled: Array) -> Interval:
    """A number with the 2.5th and 97.5th percentiles of its resamples (R,)."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value=float(value), low=float(low), high=float(high))


def mean_interval(values: Array, *, bootstrap: int, seed: int) -> Interval:
    """The mean of one number per image, (N,)."""
    values = np.asarray(values, dtype=float)
    counts = resample(len(values), bootstrap=bootstrap, seed=seed)
    return interval(values.mean(), counts @ values / len(values))


def paired_gain(before: Array, after: Array, *, bootstrap: int, seed: int) -> Interval:
    """The mean of after - before over the same N images.

    An interval without zero is a difference beyond chance.

    Raises:
        ValueError: the two differ in length.
    """
    _check_paired(before, after)
    return mean_interval(np.subtract(after, before, dtype=float), bootstrap=bootstrap, seed=seed)


def _check_paired(before: Array | Tensor, after: Array | Tensor) -> None:
    if len(before) != len(after):
        raise ValueError(f"paired sets differ in size: {len(before)} and {len(after)}")


# ---- Distances between sets of images ------------------------------------------------------------


def kid(real: Tensor, generated: Tensor) -> float:
    """Kernel Inception Distance between features (N, D) and (M, D); 0 for equal distributions.

    The unbiased estimate of the squared maximum mean discrepancy (`unbiased_mmd2`) with the
    polynomial kernel k(x, y) = (x . y / D + 1)^3; like every unbiased estimate of a number that is
    never negative, it falls below zero for sets that are alike.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs" (arXiv 1801.01401).
    """
    once = np.ones((1, len(real))), np.ones((1, len(generated)))
    return float(unbiased_mmd2(PolynomialKernels(real, generated), *once)[0])


def kid_interval(real: Tensor, generated: Tensor, *, bootstrap: int, seed: int) -> Interval:
    """KID of features (N, D) and (M, D); both sets are resampled."""
    counts_real = resample(len(real), bootstrap=bootstrap, seed=seed)
    counts_generated = resample(len(generated), bootstrap=bootstrap, seed=seed + 1)
    kernels = PolynomialKernels(real, generated)
    return interval(kid(real, generated), unbiased_mmd2(kernels, counts_real, counts_generated))


def kid_gain(real: Tensor, before: Tensor, after: Tensor, *, bootstrap: int, seed: int) -> Interval:
    """KID(before) - KID(after): above zero, `after` is better.

    Args:
        real: features (N, D).
        before, after: features (M, D) of images of the same M captions, which are resampled
            together.

    Raises:
        ValueError: before and after differ in length.
    """
    _check_paired(before, after)
    counts_real = resample(len(real), bootstrap=bootstrap, seed=seed)
    counts = resample(len(before), bootstrap=bootstrap, seed=seed + 1)
    resampled = unbiased_mmd2(PolynomialKernels(real, before), counts_real, counts) - unbiased_mmd2(
        PolynomialKernels(real, after), counts_real, counts
    )
    return interval(kid(real, before) - kid(real, after), resampled)


class PolynomialKernels:
    """k(x, y) = (x . y / D + 1)^3 of all pairs within and between two sets, (N, D) and (M, D).

    Attributes:
        xx, yy: (N, N) and (M, M), with zeros on the diagonal: no image is compared with itself.
        xy: (N, M).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        a, b = x.double().numpy(), y.double().numpy()
        self.xx, self.xy, self.yy = (_polynomial(*pair) for pair in ((a, a), (a, b), (b, b)))
        np.fill_diagonal(self.xx, 0)
        np.fill_diagonal(self.yy, 0)


def _polynomial(x: Array, y: Array) -> Array:
    kernel: Array = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def unbiased_mmd2(kernels: PolynomialKernels, x_counts: Array, y_counts: Array) -> Array:
    """MMD_u^2, the unbiased estimate of the squared maximum mean discrepancy, of R resamples: (R,).

    An image that a resample holds twice is not compared with itself, which keeps every resample
    unbiased.

    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", lemma 6.

    Args:
        x_counts, y_counts: how often each image occurs in each resample, (R, N) and (R, M).
    """
    within_x, within_y = _mean_within(kernels.xx, x_counts), _mean_within(kernels.yy, y_counts)
    pairs = x_counts.sum(1) * y_counts.sum(1)
    between: Array = ((x_counts @ kernels.xy) * y_counts).sum(1) / pairs
    return within_x + within_y - 2 * between


def _mean_within(kernel: Array, counts: Array) -> Array:
    """The mean kernel of all pairs of different images of each resample, (R,)."""
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    mean: Array = ((counts @ kernel) * counts).sum(1) / pairs
    return mean


def nearest_distance(images: Tensor, reference: Tensor) -> Array:
    """Root mean square difference, 0 to 1, of each image to the nearest of `reference`: (N,).

    Images are compared at a quarter of their resolution, where a blurred copy lies within 0.02 of
    its original and the nearest neighbour of a new icon beyond 0.04. (ImageNet features do not tell
    the two apart: held-out icons and copies overlap in cosine similarity.)

    Args:
        images, reference: uint8 (N, 3, H, W) and (M, 3, H, W).
    """
    x, y = (F.avg_pool2d(z.float() / 255, 4).flatten(1) for z in (images, reference))
    distances = torch.cdist(x, y) / x.shape[1] ** 0.5
    nearest: Array = distances.min(1).values.double().numpy()
    return nearest


# ---- Images against captions, and against images -------------------------------------------------


def retrieval_at_1(images: Tensor, captions: Tensor) -> Array:
    """Whether each image's own caption is the nearest of all M: 1.0 or 0.0, (N,). Chance is 1 / M.

    Args:
        images: l2-normalised embeddings (N, E).
        captions: l2-normalised embeddings (M, E), M >= N; row i < N belongs to image i, the others
            to none.
    """
    best = (images @ captions.T).argmax(1)
    hits: Array = (best == torch.arange(len(images))).double().numpy()
    return hits


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


def _array(values: Tensor) -> Array:
    array: Array = values.double().numpy()
    return array
