"""Text to image: the caption alone says what to generate; no token of the image is given."""

from __future__ import annotations

import numpy as np

from pipeline.tasks import Example

SOURCE = False


def example(image_tokens: np.ndarray, rng: np.random.Generator) -> Example:
    """int64 (N,) -> an example without a source."""
    return Example(image_tokens, np.zeros(len(image_tokens), bool), image_tokens)
