"""Images made worse in ways that people see at once: blurred, noisy, washed out.

The aligner is trained to prefer a real image to its own degraded copies, and its card shows that
each of them loses (pipeline/evaluation/aligner.py).

    blurred = blur(images, sigma=2.0)
    copies = degrade(images)        # each in one of the ways, by as much as chance decides

Shapes: B images, float (B, 3, S, S) in [-1, 1]; a strength is a number, or float (B,).
"""

from __future__ import annotations

import math

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor

BLUR = (0.7, 2.5)
"""Least and most standard deviation, in 64ths of the side: in pixels of an image of 64."""
NOISE = (0.05, 0.15)
"""Least and most standard deviation; black to white is 1."""
CONTRAST = (0.3, 0.65)
"""Least and most contrast that is left."""
TURNS = (0, 1, 0, 2)
"""Of blur, noise and contrast, in a batch."""


def blur(images: Tensor, sigma: float | Tensor) -> Tensor:
    """A Gaussian blur with a standard deviation of `sigma` pixels; edges are repeated."""
    sigmas = torch.as_tensor(sigma, device=images.device).expand(len(images))
    size = 2 * math.ceil(3 * float(sigmas.max())) + 1
    pairs = sigmas[:, None].expand(-1, 2)
    return gaussian_blur2d(images, (size, size), pairs, border_type="replicate")


def add_noise(images: Tensor, deviation: float | Tensor) -> Tensor:
    """Gaussian noise of a standard deviation, where black to white is 1, drawn from torch's global
    generator; what lies beyond black and white is cut off."""
    return (images + 2 * _per_image(deviation, images) * torch.randn_like(images)).clamp(-1, 1)


def wash_out(images: Tensor, contrast: float | Tensor, *, level: float | Tensor = 0.0) -> Tensor:
    """Less contrast: every pixel is drawn towards one grey.

    Args:
        contrast: 0 to 1, what is left of it.
        level: of the grey, from 0, the image's mean, to 1, white.
    """
    mean = images.mean((1, 2, 3), keepdim=True)
    grey = mean + _per_image(level, images) * (1 - mean)
    return grey + _per_image(contrast, images) * (images - grey)


def degrade(images: Tensor) -> Tensor:
    """Each image blurred, made noisy or washed out, by a random strength within the limits above.

    Every second image is blurred, which is the hardest to see; noise and less contrast share the
    others. Strengths come from torch's global generator. It is computed in float32 also within
    mixed precision, whose rounding would be one more degradation.
    """
    with torch.autocast(images.device.type, enabled=False):
        return _degrade(images)


def _degrade(images: Tensor) -> Tensor:
    count, device, side = len(images), images.device, images.shape[-1]
    strength, level = torch.rand(2, count, device=device)
    kind = torch.tensor(TURNS, device=device).repeat(count)[:count]
    blurred, noisy, washed = (kind == number for number in range(3))
    sigma, deviation, contrast = (
        low + (high - low) * strength for low, high in (BLUR, NOISE, CONTRAST)
    )
    made = images.clone()
    if count:
        made[blurred] = blur(images[blurred], sigma[blurred] * side / 64)
    made[noisy] = add_noise(images[noisy], deviation[noisy])
    made[washed] = wash_out(images[washed], contrast[washed], level=level[washed])
    return made


def _per_image(value: float | Tensor, images: Tensor) -> Tensor:
    given = torch.as_tensor(value, dtype=images.dtype, device=images.device)
    return given.expand(len(images))[:, None, None, None]
