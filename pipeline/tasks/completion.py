"""Completion: an image with a hole becomes whole again (inpainting).

In two thirds of the examples the hole is a rectangle, as when a user paints over a part; in the
others it is scattered tokens, as when a user asks for a variation. Its share of the image is
uniform in SHARE.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.tasks import Example
from pipeline.tasks._rectangles import rectangles

SOURCE = True
SHARE = (0.1, 0.9)
SCATTERED = 1 / 3


def example(image_tokens: np.ndarray, rng: np.random.Generator) -> Example:
    """int64 (N,), N a square number -> the same image as source, with a hole, and as target."""
    num_tokens = len(image_tokens)
    share = rng.uniform(*SHARE)
    if rng.random() < SCATTERED:
        hole = np.zeros(num_tokens, bool)
        hole[rng.permutation(num_tokens)[: round(share * num_tokens)]] = True
    else:
        area = torch.tensor([share * num_tokens], dtype=torch.float64)
        uniform = torch.from_numpy(rng.random((3, 1)))
        hole = rectangles(area, round(num_tokens**0.5), uniform).flatten().numpy()
    return Example(image_tokens, ~hole, image_tokens)
