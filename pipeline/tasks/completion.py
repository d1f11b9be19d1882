"""A picture with a hole becomes whole again.

The hole is a rectangle, as when a part is painted over, or in a third of the examples scattered
tokens, as when a variation is asked for; its share of the picture is uniform.
"""

from __future__ import annotations

import numpy as np

from pipeline.tasks import Example

SOURCE = True
SHARE = (0.1, 0.9)
SCATTERED = 1 / 3


def example(image_tokens: np.ndarray, rng: np.random.Generator) -> Example:
    """int64 (N,), N a square number -> the same picture as source, with a hole, and as target."""
    num_tokens = len(image_tokens)
    share = rng.uniform(*SHARE)
    if rng.random() < SCATTERED:
        given = np.ones(num_tokens, bool)
        given[rng.permutation(num_tokens)[: round(share * num_tokens)]] = False
    else:
        given = ~_rectangle(round(num_tokens**0.5), share, rng).ravel()
    return Example(image_tokens, given, image_tokens)


def _rectangle(side: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """bool (side, side), True inside a rectangle of about that share, at least one cell."""
    area, aspect = share * side * side, np.exp(rng.uniform(-0.7, 0.7))
    height = int(np.clip(round((area * aspect) ** 0.5), 1, side))
    width = int(np.clip(round(area / height), 1, side))
    top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
    hole = np.zeros((side, side), bool)
    hole[top : top + height, left : left + width] = True
    return hole
