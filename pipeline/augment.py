"""Random changes to whole batches of pictures, on whatever device they are (kornia).

Randomness is torch's global generator, which the training loop seeds by (seed, step, rank).
"""

from __future__ import annotations

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import AugmentConfig


class Augment(nn.Module):
    """uint8 (B, 3, H, W) -> uint8 (B, 3, H, W). White stays white where the picture moves away."""

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__()
        self.swap_channels = config.swap_channels
        steps: list[nn.Module] = []
        if config.flip:
            steps.append(K.RandomHorizontalFlip(p=config.flip))
        if config.zoom:
            steps.append(K.RandomAffine(0.0, scale=(1 - config.zoom, 1 + config.zoom), p=1.0))
        if config.color:
            strength = 0.4 * config.color
            steps.append(K.ColorJiggle(strength, strength, strength, 0.1 * config.color, p=0.8))
        if config.blur:
            steps.append(K.RandomGaussianBlur((5, 5), (0.3, 1.6), p=config.blur))
        self.steps = nn.Sequential(*steps)
        self.shift = config.shift
        self.noise = config.noise

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        inverted = 1 - images.float() / 255  # white is 0, so what kornia pads with is white
        inverted = self.steps(inverted)
        if self.shift:
            inverted = shift_whole_pixels(inverted, self.shift)
        if self.swap_channels:
            chosen = torch.rand(len(images), device=images.device) < self.swap_channels
            order = torch.randperm(3, device=images.device)
            inverted[chosen] = inverted[chosen][:, order]
        if self.noise:
            sigma = torch.rand(len(images), 1, 1, 1, device=images.device) * self.noise
            inverted = inverted + sigma * torch.randn_like(inverted)
        return ((1 - inverted).clamp(0, 1) * 255).round().to(torch.uint8)


def shift_whole_pixels(images: Tensor, limit: int) -> Tensor:
    """Move each picture (B, C, H, W) by up to `limit` pixels either way; zeros come in.

    Whole pixels, because interpolation would teach a tokenizer blur.
    """
    B, C, H, W = images.shape
    device = images.device
    padded = F.pad(images, [limit] * 4)
    top, left = torch.randint(0, 2 * limit + 1, (2, B), device=device)
    rows = top[:, None] + torch.arange(H, device=device)
    columns = left[:, None] + torch.arange(W, device=device)
    picture = torch.arange(B, device=device)[:, None, None, None]
    channel = torch.arange(C, device=device)[None, :, None, None]
    return padded[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]
