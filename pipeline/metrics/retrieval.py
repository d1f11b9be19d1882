"""Images against their captions, in the space where a judge embeds both.

    hits = recall_at_k(images, captions, k=5)   # of embeddings: does the caption rank in the top 5?
    cosines = alignment(images, captions)

Retrieval says whether an image shows its own caption rather than another; alignment how well, which
also grows where retrieval is at its ceiling, but is comparable within one judge alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.metrics.bootstrap import Array


def recall_at_k(images: Tensor, captions: Tensor, k: int) -> Array:
    """Whether each image's own caption is among the k nearest of all M: 1.0 or 0.0, (N,).

    Chance is k / M. A caption that is as near as the own one counts as nearer, so that a judge that
    embeds everything alike finds nothing.

    Args:
        images: l2-normalised embeddings (N, E).
        captions: l2-normalised embeddings (M, E), M >= N; row i < N belongs to image i, the others
            to none.

    Raises:
        ValueError: there are fewer captions than images.
    """
    _check_captioned(images, captions)
    similarity = images.double() @ captions.double().T
    nearer = (similarity >= similarity.diagonal()[:, None]).sum(1) - 1
    hits = (nearer < k).double()
    hits[similarity.isnan().any(1)] = torch.nan
    array: Array = hits.numpy()
    return array


def alignment(images: Tensor, captions: Tensor) -> Array:
    """The cosine similarity of each image to its own caption, -1 to 1: (N,).

    Source: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning"
    (arXiv 2104.08718), section 3, without its weight and its clipping at zero.

    Args:
        images, captions: as `recall_at_k` takes them.

    Raises:
        ValueError: there are fewer captions than images.
    """
    _check_captioned(images, captions)
    cosines: Array = (images.double() * captions[: len(images)].double()).sum(1).numpy()
    return cosines


def _check_captioned(images: Tensor, captions: Tensor) -> None:
    if len(captions) < len(images):
        raise ValueError(f"{len(images)} images have only {len(captions)} captions")
