"""Guidance, noise and mask schedules as pure functions, named after their papers.

MaskGIT is Chang et al. 2022 (arXiv 2202.04200).

Shapes: B pictures, N image tokens, V codebook size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import GeneratorConfig

GREEDY = 1e-4  # lower temperatures are taken for 0: logits divided by them could overflow


def cosine_mask_ratio(progress: Tensor) -> Tensor:
    """Share of tokens still masked at `progress` in [0, 1] (MaskGIT, sec. 3.3)."""
    return torch.cos(progress * math.pi / 2)


def random_masks(
    batch_size: int, grid_size: int, *, rectangle_fraction: float, device: torch.device
) -> Tensor:
    """Training masks, bool (B, N), True is hidden: a cosine-distributed share of the tokens.

    `rectangle_fraction` of the masks are one rectangle of about that area, so that the model also
    learns to complete pictures.
    """
    N = grid_size * grid_size
    ratio = cosine_mask_ratio(torch.rand(batch_size, device=device))
    count = (ratio * N).ceil().clamp(1, N)
    order = torch.rand(batch_size, N, device=device).argsort(1).argsort(1)
    scattered = order < count[:, None]
    is_rectangle = torch.rand(batch_size, device=device) < rectangle_fraction
    return torch.where(is_rectangle[:, None], _rectangles(count, grid_size), scattered)


def token_dropout(tokens: Tensor, largest_rate: float) -> Tensor:
    """Which tokens (B, N) a sequential model may not look back at in training, bool (B, N).

    Word dropout (Bowman et al. 2016, arXiv 1511.06349, sec. 3.1), at a rate of each picture's own,
    evenly from 0 to `largest_rate`: whole pictures, as in drawing, are met as well.
    """
    rate = largest_rate * torch.rand(len(tokens), 1, device=tokens.device)
    return torch.rand(tokens.shape, device=tokens.device) < rate


def _rectangles(area: Tensor, grid_size: int) -> Tensor:
    """One rectangle a picture of about `area` cells, bool (B, N)."""
    device = area.device
    aspect = torch.exp((torch.rand(len(area), device=device) - 0.5) * 1.4)
    height = (area * aspect).sqrt().round().clamp(1, grid_size)
    width = (area / height).round().clamp(1, grid_size)
    top = (torch.rand(len(area), device=device) * (grid_size - height + 1)).floor()
    left = (torch.rand(len(area), device=device) * (grid_size - width + 1)).floor()
    cell = torch.arange(grid_size, device=device)
    rows = (cell >= top[:, None]) & (cell < (top + height)[:, None])
    columns = (cell >= left[:, None]) & (cell < (left + width)[:, None])
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def touched_cells(mask: Tensor, grid_size: int) -> Tensor:
    """Which tokens of a picture a mask of its pixels, bool (S, S), touches: bool (N,)."""
    cell = mask.shape[0] // grid_size
    return mask.view(grid_size, cell, grid_size, cell).any(3).any(1).flatten()


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Logits (B, ..., V) away from unconditional ones by scale (B,) (Ho & Salimans 2022, eq. 6).

    Features before a linear head may be given instead: the head of the result is the same.
    """
    return unconditional.lerp(conditional, scale.view(-1, *[1] * (conditional.ndim - 1)))


def guidance_at(scale: Tensor, progress: Tensor, schedule: str) -> Tensor:
    """Guidance scales (B,) of the step at `progress` (B,) in (0, 1], which is 1 at the last one.

    "linear" rises from 1 to the scale, so that the first tokens are drawn freely (Chang et al.
    2023, Muse, arXiv 2301.00704, sec. 2.7); "constant" is the scale throughout.
    """
    return scale if schedule == "constant" else 1 + (scale - 1) * progress


def drop_conditions(
    mask: Tensor, style: Tensor, *, config: GeneratorConfig, no_style: int
) -> tuple[Tensor, Tensor]:
    """Leave out some captions and, independently, some styles, so that guidance has a free model.

    Args:
        mask: bool (B, L), which caption tokens count; style: int64 (B,).

    Returns:
        mask, False throughout where the caption is dropped, and style, then `no_style`.
    """
    kept_caption, kept_style = (
        torch.rand(len(mask), device=mask.device) < 1 - dropout
        for dropout in (config.caption_dropout, config.style_dropout)
    )
    return mask & kept_caption[:, None], torch.where(kept_style, style, no_style)


def truncated(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V), -inf beyond the top_k likeliest and beyond the smallest set whose
    probability reaches top_p (Holtzman et al. 2020, arXiv 1904.09751); 0 and 1 switch them off."""
    if 0 < top_k < logits.shape[-1]:
        others = torch.ones_like(logits, dtype=torch.bool)
        others.scatter_(-1, logits.topk(top_k, -1).indices, False)  # so many, ties or not
        logits = logits.masked_fill(others, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(beyond, -math.inf)
    return logits


def categorical(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 (B,) by inverse transform sampling: one random number a token.

    Args:
        logits: (B, V).
        temperature: (B,); below GREEDY the likeliest is taken.
        uniform: (B,) in [0, 1).
    """
    sure = temperature < GREEDY
    if sure.all():
        return logits.argmax(-1)
    shares = (logits / temperature.masked_fill(sure, 1)[:, None]).softmax(-1).cumsum_(-1)
    total = shares[:, -1]
    below = total.nextafter(torch.zeros_like(total))  # what is impossible is never reached
    reached = torch.minimum(uniform * total, below)[:, None]
    drawn = torch.searchsorted(shares, reached, right=True)[:, 0]
    return torch.where(sure, logits.argmax(-1), drawn) if sure.any() else drawn


def noise_of(seed: int) -> torch.Generator:
    """A picture's own noise, on the CPU; its generator takes 32 bits, so longer seeds are hashed.

    Args:
        seed: 0 to contracts.MAX_SEED.
    """
    if seed >= 2**32:
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed(seed)


def uniform_noise(counts: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """counts[b] numbers in [0, 1) from generators[b] alone, one row after another, on the CPU."""
    pairs = zip(counts, generators, strict=True)
    return torch.cat([torch.rand(count, generator=noise) for count, noise in pairs])


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise of numbers in [0, 1)."""
    return -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()


def keep_most_confident(confidence: Tensor, known: Tensor, num_hidden: Tensor) -> Tensor:
    """Which tokens are known after a decoding step (MaskGIT, sec. 3.2).

    Args:
        confidence: (B, N); only unknown tokens compete.
        known: bool (B, N), tokens settled in earlier steps, which stay so.
        num_hidden: int (B,), how many tokens stay hidden.

    Returns:
        bool (B, N).
    """
    N = known.shape[1]
    ranked = confidence.masked_fill(known, math.inf)
    rank = ranked.argsort(1, descending=True).argsort(1)
    return known | (rank < (N - num_hidden)[:, None])
