"""Generated images against the region of feature space that real ones fill.

Each set's region is the union of balls around its images, each as wide as the distance to the
image's k-th nearest neighbour in the set.

    precision, density    of generated images: are they where real ones are? (fidelity)
    recall, coverage      of real images: are generated ones where they are? (variety)
    diversity             of generated images: are they as far from each other as real ones?

All take features (N, D) of real images and of images generated for the same captions in the same
order, and give one value per row, (N,). Values of sets of different size or k do not compare: with
few images the balls are wide.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist
from torch import Tensor

from pipeline.metrics.bootstrap import Array, check_paired


def precision(real: Tensor, generated: Tensor, *, k: int = 3) -> Array:
    """Whether each generated image lies in a ball of a real one: 1.0 or 0.0, (N,).

    Source: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
    Models" (arXiv 1904.06991), equations 1 and 2, where k is 3.

    Args:
        real, generated: features (N, D).
        k: which neighbour's distance is the radius.

    Raises:
        ValueError: the sets differ in size, or have no k-th neighbours.
    """
    return _any(_inside(generated, real, k), axis=1)


def recall(real: Tensor, generated: Tensor, *, k: int = 3) -> Array:
    """Whether each real image lies in a ball of a generated one: 1.0 or 0.0, (N,).

    One outlier among the generated images has a wide ball and lifts recall: see `coverage`.

    Source, arguments and errors: as of `precision`.
    """
    return _any(_inside(real, generated, k), axis=1)


def density(real: Tensor, generated: Tensor, *, k: int = 5) -> Array:
    """In how many balls of real images each generated one lies, divided by k: 0 or more, (N,).

    Its mean is 1 in expectation where both sets have the same distribution, and greater where
    generated images crowd where real ones are dense.

    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models"
    (arXiv 2002.09797), section 3, where k is 5.

    Args and errors: as of `precision`.
    """
    share: Array = _inside(generated, real, k).sum(1) / k
    return share


def coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> Array:
    """Whether a generated image lies in the ball of each real one: 1.0 or 0.0, (N,).

    Where both sets have the same distribution its mean is about 1 - 2^-k.

    Source: Naeem et al. 2020, section 3 and lemma 2.

    Args and errors: as of `precision`.
    """
    return _any(_inside(generated, real, k), axis=0)


def diversity(real: Tensor, generated: Tensor) -> Array:
    """How far each generated image is from the others of its set, on average, divided by the same
    of the real image of its caption: 1 as diverse as real images, 0 all alike, (N,).

    Noise and broken images are diverse, too: it is to be read beside precision.

    Args:
        real, generated: features (N, D).

    Raises:
        ValueError: the sets differ in size, or hold fewer than two images.
    """
    _check_neighbours(real, generated, 1)
    # the distance to itself is zero; the number of others cancels out
    ratio: Array = _distances(generated, generated).sum(1) / _distances(real, real).sum(1)
    return ratio


def _inside(points: Tensor, centres: Tensor, k: int) -> Array:
    """Which points (N, D) lie in the balls around which centres (N, D): 1.0 or 0.0, NaN where a
    feature is NaN; (N, N)."""
    _check_neighbours(points, centres, k)
    own = _distances(centres, centres)
    np.fill_diagonal(own, -1)  # itself comes first, whatever its copies
    radii = np.partition(own, k, axis=1)[:, k]
    distances = _distances(points, centres)
    return np.where(np.isnan(distances), np.nan, distances <= radii)


def _distances(x: Tensor, y: Tensor) -> Array:
    """Euclidean distances (N, M), equal where the features are: they are not expanded into dot
    products, whose rounding would decide on which side of its ball a copy lies."""
    distances: Array = cdist(x.double().numpy(), y.double().numpy())
    return distances


def _any(inside: Array, axis: int) -> Array:
    """1.0 where a value along the axis is 1.0, NaN where one is NaN."""
    found: Array = inside.max(axis)
    return found


def _check_neighbours(x: Tensor, y: Tensor, k: int) -> None:
    check_paired(x, y)
    if not 1 <= k < len(x):
        raise ValueError(f"{len(x)} images have no {k} neighbours each: give 1 <= k < {len(x)}")
