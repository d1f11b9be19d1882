"""Bootstrap intervals: how far a number could be from what more images would show.

Evaluation sets are small (hundreds of images), so every number comes with an interval,
bootstrapped over images by the percentile method.

    mean_interval(hits, bootstrap=1_000, seed=0)
    paired_gain(hits_before, hits_after, bootstrap=10_000, seed=0, level=0.99)

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
"""

from __future__ import annotations

from collections.abc import Sized
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import Interval

Array = NDArray[np.float64]
LEVEL = 0.95


@lru_cache(maxsize=8)  # an evaluation asks hundreds of times for the same few
def resample(n: int, *, bootstrap: int, seed: int) -> Array:
    """How often each of n images occurs in each resample: (R, n), read-only; rows sum to n."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), bootstrap).astype(float)
    counts.flags.writeable = False
    return counts


def interval(value: float, resampled: Array, *, level: float = LEVEL) -> Interval:
    """A number with the percentiles of its resamples (R,) that enclose `level` of them.

    If the number or a resample is NaN, so are the number and both bounds.

    Args:
        level: in (0, 1). A bound needs about 10 resamples beyond it: R >= 20 / (1 - level).
    """
    assert 0 < level < 1, level
    if np.isnan(value) or np.isnan(resampled).any():
        return Interval(np.nan, np.nan, np.nan)
    low, high = np.percentile(resampled, (50 * (1 - level), 50 * (1 + level)))
    return Interval(value=float(value), low=float(low), high=float(high))


def mean_interval(values: Array, *, bootstrap: int, seed: int, level: float = LEVEL) -> Interval:
    """The mean of one number per image, (N,); NaN with NaN bounds if there is no image, or one
    without a finite number.

    Args:
        bootstrap: R.
        level: the share of resamples that the interval encloses.
    """
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        return Interval(np.nan, np.nan, np.nan)
    counts = resample(len(values), bootstrap=bootstrap, seed=seed)
    return interval(values.mean(), counts @ values / len(values), level=level)


def paired_gain(
    before: Array, after: Array, *, bootstrap: int, seed: int, level: float = LEVEL
) -> Interval:
    """The mean of after - before over the same N images.

    An interval without zero is a difference beyond chance.

    Raises:
        ValueError: the two differ in length.
    """
    check_paired(before, after)
    gains = np.subtract(after, before, dtype=float)
    return mean_interval(gains, bootstrap=bootstrap, seed=seed, level=level)


def check_paired(before: Sized, after: Sized) -> None:
    """Raises:
    ValueError: the two differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"paired sets differ in size: {len(before)} and {len(after)}")
