"""Pictures to go on from, laid out as image tokens with holes.

Shapes: B pictures, N image tokens, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.contracts import Canvas, ImageTokenizer
from pipeline.images import to_float, to_uint8
from pipeline.models import _sampling as sampling
from pipeline.runtime import autocast, autocast_dtype


@dataclass
class Start:
    """What is known of B pictures before the first step.

    Attributes:
        tokens: int64 (B, N), meaningless where hidden.
        hidden: bool (B, N).
        pixels: uint8 (B, 3, S, S), kept where `redrawn` is False.
        redrawn: bool (B, 1, S, S).
    """

    tokens: Tensor
    hidden: Tensor
    pixels: Tensor
    redrawn: Tensor


def decoded(tokenizer: ImageTokenizer, tokens: Tensor, device: torch.device) -> Tensor:
    """Image tokens int64 (B, N) -> uint8 (B, 3, S, S), each as if it were alone: in float32 a
    convolution's last bits depend on what else is in its batch."""
    alone = autocast_dtype(device) is None
    with autocast(device):
        pieces = tokens.split(1) if alone else [tokens]
        return torch.cat([to_uint8(tokenizer.decode(piece)) for piece in pieces])


def lay_out(
    canvases: Sequence[Canvas | None],
    tokenizer: ImageTokenizer,
    num_tokens: int,
    noise: Sequence[torch.Generator],
    device: torch.device,
) -> Start:
    """Encode every canvas; all is hidden where there is none.

    Args:
        noise: one a picture; chooses the tokens of a canvas without a mask.
    """
    B, S, N = len(canvases), tokenizer.image_size, num_tokens
    start = Start(
        tokens=torch.zeros(B, N, dtype=torch.long, device=device),
        hidden=torch.ones(B, N, dtype=torch.bool, device=device),
        pixels=torch.zeros(B, 3, S, S, dtype=torch.uint8, device=device),
        redrawn=torch.ones(B, 1, S, S, dtype=torch.bool, device=device),
    )
    for row, canvas in enumerate(canvases):
        if canvas is not None:
            _lay(canvas, start, row, tokenizer, noise[row])
    return start


def _lay(
    canvas: Canvas, start: Start, row: int, tokenizer: ImageTokenizer, noise: torch.Generator
) -> None:
    """One at a time: a batch's size must not move the last bits of anybody's tokens."""
    S, N = tokenizer.image_size, start.hidden.shape[1]
    pixels = torch.frombuffer(bytearray(canvas.pixels), dtype=torch.uint8)
    start.pixels[row] = pixels.view(S, S, 3).permute(2, 0, 1)
    start.tokens[row] = tokenizer.encode(to_float(start.pixels[row : row + 1]))[0]
    if canvas.mask is None:
        order = torch.rand(N, generator=noise).argsort()
        start.hidden[row] = False
        start.hidden[row, order[: max(1, round(canvas.share * N))]] = True
        return
    mask = torch.frombuffer(bytearray(canvas.mask), dtype=torch.uint8).view(S, S) != 0
    start.redrawn[row, 0] = mask
    start.hidden[row] = sampling.touched_cells(mask, round(N**0.5))
