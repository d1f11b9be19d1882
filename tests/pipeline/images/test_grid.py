"""Contact sheets: where images lie, and labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.images.grid import grid


def test_grid_places_images_row_by_row() -> None:
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    images[3] = 200
    sheet = np.asarray(grid(images, columns=3, gap=2))
    assert sheet.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert (sheet[12:20, 2:10] == 200).all(), "the fourth image opens the second row"
    assert (sheet[12:20, 22:30] == 255).all(), "the last cell stays empty"


def test_grid_draws_labels_and_refuses_wrong_numbers_of_them() -> None:
    images = np.full((4, 3, 32, 32), 255, np.uint8)
    sheet = grid(
        images,
        columns=2,
        row_labels=["apple", "苹果"],
        column_labels=["a", "b"],
        captions=["one", "two", "three", "a caption much too long for its image"],
    )
    assert np.asarray(sheet).min() < 100, "labels are dark"
    with pytest.raises(ValueError, match="captions has 3 entries, the grid needs 4"):
        grid(images, columns=2, captions=["a", "b", "c"])
    with pytest.raises(ValueError, match="needs pictures and columns"):
        grid(images[:0], columns=2)
