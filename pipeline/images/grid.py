"""Images side by side on white, with labels and captions, for people to look at.

grid(images, columns=4, captions=captions).save("grid.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.fonts import draw_text, load_font
from pipeline.images.pixels import WHITE, to_pil

if TYPE_CHECKING:  # importing PyTorch takes seconds, and a grid of arrays does without it
    from torch import Tensor


def grid(
    images: NDArray[np.uint8] | Tensor,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    scale: int = 1,
    gap: int = 4,
) -> Image.Image:
    """The images row by row.

    Args:
        images: uint8 (B, 3, H, W).
        columns: images per row.
        row_labels: one per row, drawn left of it.
        column_labels: one per column, drawn above it.
        captions: one per image, drawn below it and cut to its width.
        scale: every pixel becomes scale x scale pixels.
        gap: pixels between images.

    Raises:
        ValueError: no image, no column, or labels that do not match the images in number.
    """
    num_rows = _num_rows(len(images), columns, row_labels, column_labels, captions)
    cells = [to_pil(image) for image in images]
    cell_w, cell_h = (side * scale for side in cells[0].size)
    font = load_font()
    line = sum(font.getmetrics()) + 2
    left = max((round(font.getlength(label)) + gap for label in row_labels), default=0)
    top = line if column_labels else 0
    step_x, step_y = cell_w + gap, cell_h + gap + (line if captions else 0)
    size = (left + columns * step_x + gap, top + num_rows * step_y + gap)
    canvas = Image.new("RGB", size, WHITE)
    for index, cell in enumerate(cells):
        x = left + gap + index % columns * step_x
        y = top + gap + index // columns * step_y
        canvas.paste(cell.resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        if captions:
            draw_text(canvas, (x, y + cell_h), captions[index], font, max_width=cell_w)
    for row, label in enumerate(row_labels):
        y = top + gap + row * step_y + (cell_h - line) // 2
        draw_text(canvas, (gap, y), label, font, max_width=left)
    for column, label in enumerate(column_labels):
        x = left + gap + column * step_x
        draw_text(canvas, (x, 0), label, font, max_width=cell_w)
    return canvas


def _num_rows(
    num_images: int,
    columns: int,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[str],
) -> int:
    if num_images < 1 or columns < 1:
        raise ValueError(f"a grid needs pictures and columns, got {num_images} and {columns}")
    num_rows = -(-num_images // columns)
    counts = {
        "row_labels": (len(row_labels), num_rows),
        "column_labels": (len(column_labels), columns),
        "captions": (len(captions), num_images),
    }
    for name, (given, needed) in counts.items():
        if given not in (0, needed):
            raise ValueError(f"{name} has {given} entries, the grid needs {needed}")
    return num_rows
