"""Canvases (images to go on from) as image tokens, some of them hidden, and image tokens as pixels.

Every image is encoded alone and, in float32, decoded alone: the last bits of a convolution's
result depend on the size of its batch, and an image must not depend on its neighbours.

Shapes: B images, N image tokens (N = grid_size ** 2), S pixels per side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.contracts import Canvas, ImageTokenizer
from pipeline.images.pixels import to_float, to_uint8
from pipeline.models.decoding import sampling
from pipeline.runtime import autocast, autocast_dtype


@dataclass(frozen=True)
class EncodedCanvas:
    """What is known of one image before the first decoding step.

    Attributes:
        tokens: int64 (N,), meaningless where hidden.
        hidden: bool (N,), the tokens to decode; the others are given.
        pixels: uint8 (3, S, S), which the result keeps outside `inpainted`.
        inpainted: bool (1, S, S), the pixels to generate.
    """

    tokens: Tensor
    hidden: Tensor
    pixels: Tensor
    inpainted: Tensor


def empty_canvas(tokenizer: ImageTokenizer, device: torch.device) -> EncodedCanvas:
    """Nothing is known: every token is hidden and every pixel is generated."""
    N, S = tokenizer.grid_size**2, tokenizer.image_size
    return EncodedCanvas(
        tokens=torch.zeros(N, dtype=torch.long, device=device),
        hidden=torch.ones(N, dtype=torch.bool, device=device),
        pixels=torch.zeros(3, S, S, dtype=torch.uint8, device=device),
        inpainted=torch.ones(1, S, S, dtype=torch.bool, device=device),
    )


def encode_canvas(
    canvas: Canvas, tokenizer: ImageTokenizer, rng: torch.Generator, device: torch.device
) -> EncodedCanvas:
    """Tokenize a canvas of the tokenizer's image size and hide what is to be decoded anew.

    Args:
        rng: on the CPU; chooses the hidden tokens of a canvas that has a share but no mask.
    """
    N, S = tokenizer.grid_size**2, tokenizer.image_size
    pixels = torch.frombuffer(bytearray(canvas.pixels), dtype=torch.uint8)
    pixels = pixels.view(S, S, 3).permute(2, 0, 1).contiguous().to(device)
    tokens = tokenizer.encode(to_float(pixels[None]))[0]
    inpainted = torch.ones(1, S, S, dtype=torch.bool)
    if canvas.mask is None:
        hidden = torch.zeros(N, dtype=torch.bool)
        hidden[torch.rand(N, generator=rng).argsort()[: max(1, round(canvas.share * N))]] = True
    else:
        mask = torch.frombuffer(bytearray(canvas.mask), dtype=torch.uint8).view(S, S) != 0
        inpainted[0] = mask
        hidden = sampling.tokens_under(mask, tokenizer.grid_size)
    return EncodedCanvas(tokens, hidden.to(device), pixels, inpainted.to(device))


def decode_tokens(tokenizer: ImageTokenizer, tokens: Tensor, device: torch.device) -> Tensor:
    """Image tokens int64 (B, N) -> uint8 (B, 3, S, S)."""
    alone = autocast_dtype(device) is None
    with autocast(device):
        parts = torch.split(tokens, 1) if alone else [tokens]
        return torch.cat([to_uint8(tokenizer.decode(part)) for part in parts])
