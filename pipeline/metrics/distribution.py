"""Distances between two sets of images in a space of features: KID, FID and CMMD.

The leading one is the Kernel Inception Distance (KID), whose estimate is unbiased at any size.

    real, generated = features(real_images), features(generated_images)
    kid_interval(real, generated, bootstrap=1_000, seed=0)

Features of either set are (N, D) and (M, D). The names are kept for whatever features are given,
also where they are not Inception's; values of different features do not compare.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.contracts import Interval
from pipeline.metrics.bootstrap import LEVEL, Array, check_paired, interval, resample

CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1_000.0
"""Sigma and the factor of Jayasumana et al. 2024, section 4."""

# ---- Distances -----------------------------------------------------------------------------------


def kid(real: Tensor, generated: Tensor) -> float:
    """Kernel Inception Distance between features (N, D) and (M, D); 0 for equal distributions.

    The unbiased estimate of the squared maximum mean discrepancy (`unbiased_mmd2`) with the
    polynomial kernel k(x, y) = (x . y / D + 1)^3; like every unbiased estimate of a number that is
    never negative, it falls below zero for sets that are alike.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs" (arXiv 1801.01401).
    """
    return _mmd2(Kernels(real, generated, polynomial_kernel))


def cmmd(real: Tensor, generated: Tensor) -> float:
    """CLIP maximum mean discrepancy between CLIP embeddings (N, D) and (M, D), which are
    l2-normalised here; 0 for equal distributions.

    1,000 times the unbiased estimate of the squared maximum mean discrepancy with the Gaussian
    kernel k(x, y) = exp(-|x - y|^2 / (2 * 10^2)). The authors' code keeps the pairs of an image
    with itself, whose value is larger, in small sets visibly.

    Source: Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image
    Generation" (arXiv 2401.09603), section 4.
    """
    x, y = F.normalize(real.double(), dim=1), F.normalize(generated.double(), dim=1)
    return CMMD_SCALE * _mmd2(Kernels(x, y, gaussian_kernel))


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (N, D) and (M, D); NaN if a feature is.

    It is |m - m'|^2 + tr(C + C' - 2 sqrt(C C')) of their means m and covariances C. The trace of
    the root is the sum of the singular values of X X'^T / sqrt((N - 1)(M - 1)), X and X' the
    centred features: with hundreds of images that takes a tenth of a second, the eigenvalues of the
    (D, D) product, which torchmetrics computes, half a minute.

    The estimate is biased upwards, more the fewer images there are, and by an amount that depends
    on the model: below some ten thousand images per set it compares nothing but sets of equal
    size, and hardly those. It has no interval for that reason: a resample of n images holds 0.63 n
    different ones and is biased more than the set itself. KID has neither problem.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
    Nash Equilibrium" (arXiv 1706.08500), equation 6. Singular values: Mathiasen and Hvilshøj 2020,
    "Backpropagating through Fréchet Inception Distance" (arXiv 2009.14075). Bias: Chong and Forsyth
    2020, "Effectively Unbiased FID and Inception Score" (arXiv 1911.07023).

    Raises:
        ValueError: a set holds fewer than two images.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"FID needs two images per set, got {len(real)} and {len(generated)}")
    if not (real.isfinite().all() and generated.isfinite().all()):
        return float("nan")
    shift = real.double().mean(0) - generated.double().mean(0)
    x, y = _covariance_root(real), _covariance_root(generated)
    root = torch.linalg.svdvals(x @ y.T).sum()
    return float(shift.square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def _covariance_root(features: Tensor) -> Tensor:
    """A with A^T A the covariance of features (N, D); (min(N, D), D)."""
    centred = features.double() - features.double().mean(0)
    root: Tensor = torch.linalg.qr(centred / (len(features) - 1) ** 0.5, mode="r").R
    return root


# ---- Intervals of KID ----------------------------------------------------------------------------


def kid_interval(
    real: Tensor, generated: Tensor, *, bootstrap: int, seed: int, level: float = LEVEL
) -> Interval:
    """KID of features (N, D) and (M, D); both sets are resampled."""
    counts_real = resample(len(real), bootstrap=bootstrap, seed=seed)
    counts_generated = resample(len(generated), bootstrap=bootstrap, seed=seed + 1)
    kernels = Kernels(real, generated, polynomial_kernel)
    resampled = unbiased_mmd2(kernels, counts_real, counts_generated)
    return interval(_mmd2(kernels), resampled, level=level)


def kid_gain(
    real: Tensor,
    before: Tensor,
    after: Tensor,
    *,
    bootstrap: int,
    seed: int,
    level: float = LEVEL,
) -> Interval:
    """KID(before) - KID(after): above zero, `after` is better.

    Args:
        real: features (N, D).
        before, after: features (M, D) of images of the same M captions, which are resampled
            together.

    Raises:
        ValueError: before and after differ in length.
    """
    check_paired(before, after)
    counts_real = resample(len(real), bootstrap=bootstrap, seed=seed)
    counts = resample(len(before), bootstrap=bootstrap, seed=seed + 1)
    old, new = (Kernels(real, features, polynomial_kernel) for features in (before, after))
    resampled = unbiased_mmd2(old, counts_real, counts) - unbiased_mmd2(new, counts_real, counts)
    return interval(_mmd2(old) - _mmd2(new), resampled, level=level)


# ---- Maximum mean discrepancy --------------------------------------------------------------------


def polynomial_kernel(x: Array, y: Array) -> Array:
    """k(x, y) = (x . y / D + 1)^3: (N, D), (M, D) -> (N, M)."""
    kernel: Array = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def gaussian_kernel(x: Array, y: Array) -> Array:
    """k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = CMMD_BANDWIDTH: (N, D), (M, D) -> (N, M)."""
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    kernel: Array = np.exp(-squared / (2 * CMMD_BANDWIDTH**2))
    return kernel


class Kernels:
    """A kernel of all pairs within and between two sets of features, (N, D) and (M, D).

    Attributes:
        xx, yy: (N, N) and (M, M), with zeros on the diagonal: no image is compared with itself.
        xy: (N, M).
    """

    def __init__(self, x: Tensor, y: Tensor, kernel: Callable[[Array, Array], Array]) -> None:
        a, b = x.double().numpy(), y.double().numpy()
        self.xx, self.xy, self.yy = (kernel(*pair) for pair in ((a, a), (a, b), (b, b)))
        np.fill_diagonal(self.xx, 0)
        np.fill_diagonal(self.yy, 0)


def unbiased_mmd2(kernels: Kernels, x_counts: Array, y_counts: Array) -> Array:
    """MMD_u^2, the unbiased estimate of the squared maximum mean discrepancy, of R resamples: (R,).

    An image that a resample holds twice is not compared with itself, which keeps every resample
    unbiased.

    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", lemma 6.

    Args:
        x_counts, y_counts: how often each image occurs in each resample, (R, N) and (R, M).
    """
    with np.errstate(invalid="ignore"):  # infinite features give NaN, which says it
        within = _mean_within(kernels.xx, x_counts) + _mean_within(kernels.yy, y_counts)
        pairs = x_counts.sum(1) * y_counts.sum(1)
        between: Array = ((x_counts @ kernels.xy) * y_counts).sum(1) / pairs
        return within - 2 * between


def _mmd2(kernels: Kernels) -> float:
    """Of the sets themselves."""
    once = [np.ones((1, count)) for count in kernels.xy.shape]
    return float(unbiased_mmd2(kernels, *once)[0])


def _mean_within(kernel: Array, counts: Array) -> Array:
    """The mean kernel of all pairs of different images of each resample, (R,)."""
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    mean: Array = ((counts @ kernel) * counts).sum(1) / pairs
    return mean
