"""Random changes to whole batches of pictures, on whatever device they are.

Every picture draws its numbers from its own seed, so a picture with a seed is changed alike on any
device and in any batch, whatever the number of workers; only MixUp and CutMix look at another
picture, the one half a batch away, which is the same one for every number of workers that divides
half the batch. Without seeds, they come from torch's global generator.

    Augment(AugmentConfig(rotate=10))(images, seeds=torch.arange(len(images)))

White stays white where a picture moves away. `Augment` prepares training data and computes no
gradients; `differentiable_augmentation` is what a GAN puts before its discriminator.

Shapes: B pictures, C = 3 channels, H = W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import kornia.augmentation as K
import numpy as np
import torch
from kornia.enhance import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import AugmentConfig

COLOR_PROBABILITY = 0.8
BLUR_SIGMA = (0.3, 1.6)  # pixels
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop (torchvision's RandomResizedCrop)
TEN_CROP_CENTRES = (
    (-1, -1),
    (1, -1),
    (-1, 1),
    (1, 1),
    (0, 0),
)  # of the room there is; then mirrored


class Draws:
    """Random numbers for B pictures, each from its own generator, in the order of the calls."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.device = device

    def uniform(self, low: float, high: float) -> Tensor:
        """float32 (B,)."""
        found = [rng.uniform(low, high) for rng in self.generators]
        return torch.tensor(found, dtype=torch.float32, device=self.device)

    def happens(self, probability: float) -> Tensor:
        """bool (B,)."""
        return self.uniform(0.0, 1.0) < probability

    def integers(self, end: int) -> Tensor:
        """int64 (B,) in [0, end)."""
        found = [int(rng.integers(end)) for rng in self.generators]
        return torch.tensor(found, device=self.device)

    def permutations(self, length: int) -> Tensor:
        """int64 (B, length)."""
        found = np.stack([rng.permutation(length) for rng in self.generators])
        return torch.from_numpy(found).to(self.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """float32 (B, *shape)."""
        found = [rng.standard_normal(tuple(shape), np.float32) for rng in self.generators]
        return torch.from_numpy(np.stack(found)).to(self.device)


class Augment(nn.Module):
    """uint8 (B, 3, H, W) -> uint8 (B, 3, H, W)."""

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self, images: Tensor, *, seeds: Tensor | None = None, flippable: Tensor | None = None
    ) -> Tensor:
        """Change every picture.

        Args:
            images: uint8 (B, 3, H, W).
            seeds: int64 (B,), not negative; from torch's global generator unless given.
            flippable: bool (B,), False where a picture must not be mirrored (pipeline/mirror.py).
        """
        config, device = self.config, images.device
        if seeds is None:
            seeds = torch.randint(2**62, (len(images),))
        draws = Draws(seeds.tolist(), device)
        allowed = torch.ones(len(images), dtype=torch.bool, device=device)
        if flippable is not None:
            allowed = flippable.to(device)
        inverted = 1 - images.float() / 255  # white is 0, and so is what comes in from outside
        if config.flip:
            inverted = mirror(inverted, draws.happens(config.flip) & allowed)
        if config.zoom or config.rotate or config.random_crop or config.ten_crop:
            inverted = self._move(inverted, draws, allowed)
        if config.color:
            inverted = jitter_colors(inverted, draws, config.color)
        if config.blur:
            chosen = draws.happens(config.blur)[:, None, None, None]
            sigma = draws.uniform(*BLUR_SIGMA)[:, None].expand(-1, 2)
            inverted = torch.where(chosen, gaussian_blur2d(inverted, (5, 5), sigma), inverted)
        if config.shift:
            inverted = shift_whole_pixels(inverted, config.shift, draws)
        if config.swap_channels:
            order = draws.permutations(images.shape[1])
            order = torch.where(
                draws.happens(config.swap_channels)[:, None], order, order.sort(1).values
            )
            inverted = inverted.gather(1, order[:, :, None, None].expand_as(inverted))
        inverted = self._cut_and_mix(inverted, draws)
        if config.noise:
            sigma = draws.uniform(0.0, config.noise)[:, None, None, None]
            inverted = inverted + sigma * draws.normal(images.shape[1:])
        return ((1 - inverted).clamp(0, 1) * 255).round().to(torch.uint8)

    def _move(self, images: Tensor, draws: Draws, allowed: Tensor) -> Tensor:
        """Zoom, rotation and crops in one resampling, so that pixels are interpolated once."""
        config, ones = self.config, torch.ones(len(images), device=images.device)
        width, height, x, y = ones, ones, 0 * ones, 0 * ones
        if config.random_crop:
            area = draws.uniform(config.random_crop, 1.0)
            ratio = draws.uniform(*map(math.log, CROP_RATIO)).exp()
            width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
            x, y = ((1 - side) * draws.uniform(-1.0, 1.0) for side in (width, height))
        if config.ten_crop:
            which = draws.integers(10)
            images = mirror(images, (which >= 5) & allowed)
            centres = torch.tensor(TEN_CROP_CENTRES, device=images.device)[which % 5]
            width = height = config.ten_crop * ones
            x, y = ((1 - config.ten_crop) * centre for centre in centres.float().unbind(1))
        angle, scale = 0 * ones, ones
        if config.rotate:
            angle = torch.deg2rad(draws.uniform(-config.rotate, config.rotate))
        if config.zoom:
            scale = draws.uniform(1 - config.zoom, 1 + config.zoom)
        return resample(images, width / scale, height / scale, x, y, angle)

    def _cut_and_mix(self, images: Tensor, draws: Draws) -> Tensor:
        """MixUp and CutMix with the picture half a batch away, then cutout (white)."""
        config = self.config
        if config.mixup:
            kept = torch.where(draws.happens(config.mixup), draws.uniform(0.0, 1.0), 1.0)
            kept = kept[:, None, None, None]
            images = kept * images + (1 - kept) * images.roll(len(images) // 2, 0)
        if config.cutmix:
            side = draws.uniform(0.0, 1.0).sqrt() * draws.happens(config.cutmix)
            box = boxes(images.shape[-1], side, draws)
            images = torch.where(box, images.roll(len(images) // 2, 0), images)
        if config.cutout:
            box = boxes(images.shape[-1], draws.uniform(0.0, config.cutout), draws)
            images = images.masked_fill(box, 0.0)
        return images


def differentiable_augmentation() -> nn.Module:
    """Colour, translation and cutout through which gradients flow: float (B, 3, H, W) in [0, 1].

    For a GAN, which changes real and generated images alike before the discriminator sees them, so
    that it cannot memorise a small data set and the generator still learns through the change.
    Random numbers come from torch's global generator.

    Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training"
    (arXiv 2006.10738), section 3.2.
    """
    return K.AugmentationSequential(
        K.ColorJitter(0.25, 0.25, 0.5, 0.0, p=1.0),
        K.RandomAffine(0.0, translate=(0.125, 0.125), p=1.0),
        K.RandomErasing((0.05, 0.2), (0.5, 2.0), p=0.5),
        data_keys=["input"],
    )


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """The chosen (bool (B,)) of the pictures (B, C, H, W), left for right."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def resample(
    images: Tensor, width: Tensor, height: Tensor, x: Tensor, y: Tensor, angle: Tensor
) -> Tensor:
    """The part of each picture (B, C, H, W) that becomes the whole; zeros come in from outside.

    Args:
        images: pictures.
        width, height: of the part, in picture sides; more than 1 shrinks.
        x, y: its centre, -1 to 1 over the picture; 0 is the middle.
        angle: radians the picture turns by, against the clock. Each float (B,).
    """
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([cos * width, -sin * height, x], 1),
        torch.stack([sin * width, cos * height, y], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def ten_crops(images: Tensor, share: float) -> Tensor:
    """Four corners and the centre, and all of them mirrored: (B, C, H, W) -> (B, 10, C, H, W).

    Args:
        images: float pictures.
        share: a crop's side, of the picture's; every crop is enlarged to H x W.
    """
    B = len(images)
    crops = []
    for source in (images, images.flip(3)):
        for centre in TEN_CROP_CENTRES:
            side = torch.full((B,), share, device=images.device)
            x, y = (torch.full_like(side, (1 - share) * place) for place in centre)
            crops.append(resample(source, side, side, x, y, torch.zeros_like(side)))
    return torch.stack(crops, 1)


def jitter_colors(images: Tensor, draws: Draws, strength: float) -> Tensor:
    """Brightness, contrast, saturation and hue of inverted pictures in [0, 1], most of the time."""
    chosen = draws.happens(COLOR_PROBABILITY)[:, None, None, None]
    most = 0.4 * strength
    changed = adjust_brightness(images, draws.uniform(-most, most))
    changed = adjust_contrast(changed, draws.uniform(1 - most, 1 + most))
    changed = adjust_saturation(changed, draws.uniform(1 - most, 1 + most))
    changed = adjust_hue(changed, 2 * math.pi * draws.uniform(-0.1 * strength, 0.1 * strength))
    return torch.where(chosen, changed, images)


def boxes(size: int, side: Tensor, draws: Draws) -> Tensor:
    """A square within each picture of `size` pixels a side: bool (B, 1, size, size).

    Args:
        size: pixels.
        side: float (B,), the square's, of the picture's.
        draws: where it is.
    """
    pixels = (side * size).round()
    left, top = ((size - pixels) * draws.uniform(0.0, 1.0) for _ in range(2))
    place = torch.arange(size, device=side.device)
    inside = [
        (place >= first.round()[:, None]) & (place < (first.round() + pixels)[:, None])
        for first in (left, top)
    ]
    return (inside[1][:, :, None] & inside[0][:, None, :])[:, None]


def shift_whole_pixels(images: Tensor, limit: int, draws: Draws) -> Tensor:
    """Move each picture (B, C, H, W) by up to `limit` pixels either way; zeros come in.

    Whole pixels, because interpolation would teach a tokenizer blur.
    """
    B, C, H, W = images.shape
    device = images.device
    padded = F.pad(images, [limit] * 4)
    top, left = draws.integers(2 * limit + 1), draws.integers(2 * limit + 1)
    rows = top[:, None] + torch.arange(H, device=device)
    columns = left[:, None] + torch.arange(W, device=device)
    picture = torch.arange(B, device=device)[:, None, None, None]
    channel = torch.arange(C, device=device)[None, :, None, None]
    return padded[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]
