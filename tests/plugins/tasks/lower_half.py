"""A task in one file, as a plugin: the upper half is given, the lower half drawn."""

from __future__ import annotations

import numpy as np

from pipeline.tasks import Example

SOURCE = True


def example(image_tokens: np.ndarray, rng: np.random.Generator) -> Example:
    """int64 (N,) -> the same image as source, whose second half is not given, and as target."""
    given = np.arange(len(image_tokens)) < len(image_tokens) // 2
    return Example(image_tokens, given, image_tokens)
