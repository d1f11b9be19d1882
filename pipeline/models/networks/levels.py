"""The FSQ levels of image tokens, by which networks embed neighbouring codes alike."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.contracts import ModelSpec


def level_digits(spec: ModelSpec) -> Tensor | None:
    """The FSQ level of each dimension of each token, int64 (codebook_size, D); None for tokenizers
    without levels."""
    if not spec.levels:
        return None
    from pipeline.tokenizers.fsq import FSQ

    return FSQ(spec.levels).digits(torch.arange(spec.codebook_size))
