"""Guidance, noise, truncation and mask schedules as pure functions, named after their papers.

Shapes: B images or rows, N image tokens, V codebook size, L caption tokens, S pixels per side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import GeneratorConfig
from pipeline.tasks._rectangles import rectangles

GREEDY = 1e-4
"""Lower temperatures are taken for 0: logits divided by them could overflow."""


def cosine_mask_ratio(progress: Tensor) -> Tensor:
    """The share of tokens still masked at `progress` in [0, 1]: 1 at 0, 0 at 1.

    Chang et al. 2022, MaskGIT (arXiv 2202.04200), sec. 3.3: gamma(r) = cos(pi r / 2). Training's
    masks (`random_masks`) and parallel decoding (`parallel._num_hidden`) both follow it; another
    schedule belongs beside it, with a setting of `models/masked.py` to choose.
    """
    return torch.cos(progress * math.pi / 2)


def random_masks(
    batch_size: int, grid_size: int, *, rectangle_fraction: float, device: torch.device
) -> Tensor:
    """Training masks, bool (B, N), True where a token is hidden.

    The share of hidden tokens is gamma(r) of a uniform r (MaskGIT, sec. 3.3). `rectangle_fraction`
    of the masks, in [0, 1], are one rectangle of about that area instead of scattered tokens, so
    that the model also learns to complete images.
    """
    N = grid_size * grid_size
    ratio = cosine_mask_ratio(torch.rand(batch_size, device=device))
    count = (ratio * N).ceil().clamp(1, N)
    order = torch.rand(batch_size, N, device=device).argsort(1).argsort(1)
    scattered = order < count[:, None]
    is_rectangle = torch.rand(batch_size, device=device) < rectangle_fraction
    uniform = torch.stack([torch.rand(batch_size, device=device) for _ in range(3)])
    rectangle = rectangles(count, grid_size, uniform).flatten(1)
    return torch.where(is_rectangle[:, None], rectangle, scattered)


def token_dropout(tokens: Tensor, largest_rate: float) -> Tensor:
    """Which tokens (B, N) a sequential model may not look back at in training, bool (B, N).

    Word dropout (Bowman et al. 2016, arXiv 1511.06349, sec. 3.1) with a rate per image, uniform in
    [0, largest_rate], so that training also meets whole images, as generation does.
    """
    rate = largest_rate * torch.rand(len(tokens), 1, device=tokens.device)
    return torch.rand(tokens.shape, device=tokens.device) < rate


def tokens_under(mask: Tensor, grid_size: int) -> Tensor:
    """Which tokens of an image a mask of its pixels touches: bool (S, S) -> bool (N,)."""
    cell = mask.shape[0] // grid_size
    return mask.view(grid_size, cell, grid_size, cell).any(3).any(1).flatten()


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """unconditional + scale * (conditional - unconditional).

    Ho and Salimans 2022 (arXiv 2207.12598), eq. 6, whose guidance strength w is scale - 1: a scale
    of 1 is the conditional prediction alone, larger ones lead away from the unconditional one.

    Args:
        conditional, unconditional: float (B, ..., V), logits or anything that becomes logits
            linearly, such as the features before a linear head.
        scale: float (B,).
    """
    return unconditional.lerp(conditional, scale.view(-1, *[1] * (conditional.ndim - 1)))


def guidance_scale_at(scale: Tensor, progress: Tensor, schedule: str) -> Tensor:
    """Guidance scales (B,) of the step at `progress` (B,) in (0, 1], which is 1 at the last one.

    "constant" is the scale throughout. "linear" rises from 1 to the scale, so that the first tokens
    are sampled freely (Chang et al. 2023, Muse, arXiv 2301.00704, sec. 2.7).
    """
    return scale if schedule == "constant" else 1 + (scale - 1) * progress


def drop_conditions(
    mask: Tensor, style: Tensor, *, config: GeneratorConfig, no_style: int
) -> tuple[Tensor, Tensor]:
    """Leave out some captions and, independently, some styles in training, so that the model also
    learns the unconditional prediction that guidance needs (Ho and Salimans 2022, algorithm 1).

    Args:
        mask: bool (B, L), which caption tokens count.
        style: int64 (B,).
        config: its caption_dropout and style_dropout are the probabilities.
        no_style: the id that stands for no style.

    Returns:
        mask, False throughout where the caption is dropped, and style, `no_style` where dropped.
    """
    kept_caption, kept_style = (
        torch.rand(len(mask), device=mask.device) < 1 - dropout
        for dropout in (config.caption_dropout, config.style_dropout)
    )
    return mask & kept_caption[:, None], torch.where(kept_style, style, no_style)


def truncate_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V) with -inf where a token may not be sampled.

    Args:
        logits: float (..., V).
        top_k: this many of the likeliest tokens remain, ties or not (Fan et al. 2018, arXiv
            1805.04833); 0 is off.
        top_p: in (0, 1], the smallest set of tokens whose probability reaches it remains (Holtzman
            et al. 2020, arXiv 1904.09751, sec. 3.1); 1 is off.
    """
    if 0 < top_k < logits.shape[-1]:
        others = torch.ones_like(logits, dtype=torch.bool)
        others.scatter_(-1, logits.topk(top_k, -1).indices, False)
        logits = logits.masked_fill(others, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(beyond, -math.inf)
    return logits


def categorical(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 (B,) by inverse transform sampling, which takes one random number per token.

    Args:
        logits: float (B, V); -inf where a token is impossible.
        temperature: float (B,); below GREEDY the likeliest token is taken.
        uniform: float (B,) in [0, 1).
    """
    greedy = temperature < GREEDY
    if greedy.all():
        return logits.argmax(-1)
    cumulative = (logits / temperature.masked_fill(greedy, 1)[:, None]).softmax(-1).cumsum_(-1)
    total = cumulative[:, -1]
    below_total = total.nextafter(torch.zeros_like(total))  # so no impossible token is reached
    reached = torch.minimum(uniform * total, below_total)[:, None]
    sampled = torch.searchsorted(cumulative, reached, right=True)[:, 0]
    return torch.where(greedy, logits.argmax(-1), sampled) if greedy.any() else sampled


def seeded_rng(seed: int) -> torch.Generator:
    """An image's own random numbers, on the CPU.

    Args:
        seed: 0 to contracts.MAX_SEED; torch's generator takes 32 bits, so longer ones are hashed.
    """
    if seed >= 2**32:
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed(seed)


def uniform_noise(counts: Sequence[int], rngs: Sequence[torch.Generator]) -> Tensor:
    """counts[b] numbers in [0, 1) from rngs[b], one image after another: float (sum(counts),)."""
    pairs = zip(counts, rngs, strict=True)
    return torch.cat([torch.rand(count, generator=rng) for count, rng in pairs])


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from numbers in [0, 1), of the same shape: -log(-log(u))."""
    return -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()


def keep_most_confident(confidence: Tensor, known: Tensor, num_hidden: Tensor) -> Tensor:
    """Which tokens are known after a step of parallel decoding (MaskGIT, sec. 3.2).

    Args:
        confidence: float (B, N); only unknown tokens compete.
        known: bool (B, N), tokens settled in earlier steps, which stay so.
        num_hidden: int (B,), how many tokens stay hidden.

    Returns:
        bool (B, N).
    """
    N = known.shape[1]
    ranked = confidence.masked_fill(known, math.inf)
    rank = ranked.argsort(1, descending=True).argsort(1)
    return known | (rank < (N - num_hidden)[:, None])
