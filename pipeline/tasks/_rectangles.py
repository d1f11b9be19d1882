"""Rectangles on a token grid: the holes of completion, and some masks of masked training."""

from __future__ import annotations

import torch
from torch import Tensor

ASPECT_RANGE = 1.4  # of log(height / width): from about 1:2 to 2:1


def rectangles(area: Tensor, grid_size: int, uniform: Tensor) -> Tensor:
    """One rectangle of about the given area per image, at least one token, anywhere on the grid.

    Args:
        area: float (B,), in tokens, 0 to grid_size ** 2.
        grid_size: tokens per side.
        uniform: (3, B) in [0, 1), random numbers for the aspect ratio (log-uniform), the top and
            the left edge.

    Returns:
        bool (B, grid_size, grid_size), True inside.
    """
    aspect = torch.exp((uniform[0] - 0.5) * ASPECT_RANGE)
    height = (area * aspect).sqrt().round().clamp(1, grid_size)
    width = (area / height).round().clamp(1, grid_size)
    top = (uniform[1] * (grid_size - height + 1)).floor()
    left = (uniform[2] * (grid_size - width + 1)).floor()
    cell = torch.arange(grid_size, device=area.device)
    rows = (cell >= top[:, None]) & (cell < (top + height)[:, None])
    columns = (cell >= left[:, None]) & (cell < (left + width)[:, None])
    return rows[:, :, None] & columns[:, None, :]
