"""The numbers that evaluation is made of, as pure functions of arrays.

    from pipeline import metrics

    hits = metrics.recall_at_k(aligner.embed_images(images), aligner.embed_captions(*states), k=1)
    metrics.mean_interval(hits, bootstrap=1_000, seed=0)
    metrics.kid_interval(real_features, features, bootstrap=1_000, seed=0)

Whatever is a mean over images comes as one value per image, (N,): its interval, its gain over
another model on the same captions (`paired_gain`) and its value on a slice of the images all follow
from those. Distances between sets (KID, FID, CMMD) have no values per image.

Nothing is ever dropped: an input that is NaN makes the values of its images NaN, and an interval of
a NaN is NaN with NaN bounds. The same inputs give the same numbers.

Shapes: N images of a set, M of another or M captions, D features, E embedding dimensions, R
bootstrap resamples.
"""

from pipeline.metrics.bootstrap import interval, mean_interval, paired_gain, resample
from pipeline.metrics.distribution import (
    Kernels,
    cmmd,
    fid,
    kid,
    kid_gain,
    kid_interval,
    polynomial_kernel,
    unbiased_mmd2,
)
from pipeline.metrics.images import (
    gradient_energy,
    nearest_neighbours,
    psnr,
    sharpness,
    ssim,
)
from pipeline.metrics.manifold import coverage, density, diversity, precision, recall
from pipeline.metrics.retrieval import alignment, recall_at_k

__all__ = [
    "Kernels",
    "alignment",
    "cmmd",
    "coverage",
    "density",
    "diversity",
    "fid",
    "gradient_energy",
    "interval",
    "kid",
    "kid_gain",
    "kid_interval",
    "mean_interval",
    "nearest_neighbours",
    "paired_gain",
    "polynomial_kernel",
    "precision",
    "psnr",
    "recall",
    "recall_at_k",
    "resample",
    "sharpness",
    "ssim",
    "unbiased_mmd2",
]
