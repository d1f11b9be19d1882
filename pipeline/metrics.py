"""The numbers that evaluation is made of, each a pure function of arrays.

Sets are small (hundreds of pictures), so the lead metric is KID, which is unbiased there, and every
number comes with a bootstrap interval over pictures. Interval: 95 %, percentile method.

    features = ImageNetFeatures()
    kid = kid_interval(features(real), features(generated), bootstrap=1_000, seed=0)
    hits = retrieval_at_1(aligner.embed_images(generated), aligner.embed_captions(states, mask))
    retrieval = mean_interval(hits, bootstrap=1_000, seed=0)

Shapes: N pictures of a set, D features, E embedding dimensions, R resamples.
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


# ---- Intervals -----------------------------------------------------------------------------------


def resample(n: int, *, bootstrap: int, seed: int) -> Array:
    """How often each of n pictures is drawn in each resample: (R, N), rows sum to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), bootstrap).astype(float)


def interval(value: float, resampled: Array) -> Interval:
    """A number with the 2.5 and 97.5 percentiles of its resamples (R,)."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value=float(value), low=float(low), high=float(high))


def mean_interval(values: Array, *, bootstrap: int, seed: int) -> Interval:
    """Mean of one number a picture, (N,)."""
    values = np.asarray(values, dtype=float)
    counts = resample(len(values), bootstrap=bootstrap, seed=seed)
    return interval(values.mean(), counts @ values / len(values))


def paired_gain(before: Array, after: Array, *, bootstrap: int, seed: int) -> Interval:
    """Mean of after - before over the same N pictures; clear of zero is beyond chance.

    Raises:
        ValueError: the two are not of the same pictures.
    """
    if len(before) != len(after):
        raise ValueError(f"paired sets differ in size: {len(before)} and {len(after)}")
    return mean_interval(np.subtract(after, before, dtype=float), bootstrap=bootstrap, seed=seed)


# ---- Distances between sets of pictures ----------------------------------------------------------


def kid(real: Tensor, generated: Tensor) -> float:
    """Kernel inception distance: unbiased MMD^2, kernel (x.y / D + 1)^3, of (N, D) and (M, D).

    Source: Binkowski et al. 2018, "Demystifying MMD GANs", section 3.1 and eq. 4.
    """
    return float(
        _kid(_Kernels(real, generated), np.ones((1, len(real))), np.ones((1, len(generated))))[0]
    )


def kid_interval(real: Tensor, generated: Tensor, *, bootstrap: int, seed: int) -> Interval:
    """KID; both sets are resampled."""
    draws_real = resample(len(real), bootstrap=bootstrap, seed=seed)
    draws_generated = resample(len(generated), bootstrap=bootstrap, seed=seed + 1)
    resampled = _kid(_Kernels(real, generated), draws_real, draws_generated)
    return interval(kid(real, generated), resampled)


def kid_gain(real: Tensor, before: Tensor, after: Tensor, *, bootstrap: int, seed: int) -> Interval:
    """KID(before) - KID(after): above zero is better. Before and after show the same captions.

    Raises:
        ValueError: before and after differ in number.
    """
    if len(before) != len(after):
        raise ValueError(f"paired sets differ in size: {len(before)} and {len(after)}")
    draws_real = resample(len(real), bootstrap=bootstrap, seed=seed)
    draws = resample(len(before), bootstrap=bootstrap, seed=seed + 1)
    resampled = _kid(_Kernels(real, before), draws_real, draws) - _kid(
        _Kernels(real, after), draws_real, draws
    )
    return interval(kid(real, before) - kid(real, after), resampled)


class _Kernels:
    """The three kernel matrices of two sets; within a set, pictures do not meet themselves."""

    def __init__(self, real: Tensor, generated: Tensor) -> None:
        x, y = real.double().numpy(), generated.double().numpy()
        self.xx, self.xy, self.yy = (
            (a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))
        )
        np.fill_diagonal(self.xx, 0)
        np.fill_diagonal(self.yy, 0)


def _kid(kernels: _Kernels, a: Array, b: Array) -> Array:
    """KID of R resamples, given as counts (R, N) and (R, M).

    A picture drawn twice is not compared with itself, which keeps every resample unbiased.
    """
    within_real = _within(kernels.xx, a)
    within_generated = _within(kernels.yy, b)
    between = ((a @ kernels.xy) * b).sum(1) / (a.sum(1) * b.sum(1))
    return within_real + within_generated - 2 * between


def _within(kernel: Array, counts: Array) -> Array:
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    return ((counts @ kernel) * counts).sum(1) / pairs


def nearest_distance(images: Tensor, reference: Tensor) -> Array:
    """Root mean square difference (0 to 1) of every picture to its nearest in `reference`: (N,).

    Compared at a quarter of the resolution, where a blurred copy lies within 0.02 of its original
    and the nearest neighbour of a new icon beyond 0.04. (ImageNet features do not tell the two
    apart: held-out icons and copies overlap in cosine.)

    Args:
        images, reference: uint8 (N, 3, H, W) and (M, 3, H, W).
    """
    x, y = (F.avg_pool2d(z.float() / 255, 4).flatten(1) for z in (images, reference))
    distances = torch.cdist(x, y) / x.shape[1] ** 0.5
    return distances.min(1).values.double().numpy()


# ---- Pictures against captions and against pictures ----------------------------------------------


def retrieval_at_1(images: Tensor, captions: Tensor) -> Array:
    """Whether a picture's own caption is the nearest of all M: 1.0 or 0.0 each, (N,).

    Args:
        images: l2-normalised (N, E).
        captions: l2-normalised (M, E), M >= N; row i belongs to picture i, the rows past N to
            none. Chance is 1 / M.
    """
    best = (images @ captions.T).argmax(1)
    return (best == torch.arange(len(images))).double().numpy()


def psnr(images: Tensor, targets: Tensor) -> Array:
    """Peak signal-to-noise ratio of each pair in dB: uint8 (N, 3, H, W) twice -> (N,)."""
    values = peak_signal_noise_ratio(
        images.float(), targets.float(), data_range=255.0, dim=(1, 2, 3), reduction="none"
    )
    return values.double().numpy()


def ssim(images: Tensor, targets: Tensor) -> Array:
    """Structural similarity (Wang et al. 2004) of each pair: uint8 (N, 3, H, W) twice -> (N,)."""
    values = structural_similarity_index_measure(
        images.float(), targets.float(), data_range=255.0, reduction="none"
    )
    return values.double().numpy()
