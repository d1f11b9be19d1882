"""Random changes to images for training, on the device they are on.

There are two kinds, because they have different tasks:

`Augment` varies the training data, as a recipe's augment section says: a tokenizer, an aligner or a
generator then sees more images than there are. It changes uint8 images and computes no gradients.
Every image draws its random numbers from a seed of its own, so that an image with a seed is changed
alike on any device, in any batch and with any number of workers. (MixUp and CutMix also use another
image, the one half a batch away; it is the same one for every number of workers that divides half
the half the batch.) White comes in where an image moves away.

    Augment(AugmentConfig(rotate=10))(images, seeds=torch.arange(len(images)))

`differentiable_augmentation` is part of a GAN's loss: real and generated images are changed before
the discriminator sees them, and gradients flow through the change to the generator. What a single
image becomes does not matter there; random numbers come from torch's global generator.

Shapes: B images, C = 3 channels, H = W pixels.
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

COLOR_PROBABILITY = 0.8  # of a change of colours
BLUR_SIGMA = (0.3, 1.6)  # pixels
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop (torchvision's RandomResizedCrop)
TEN_CROP_CENTRES = (
    (-1, -1),
    (1, -1),
    (-1, 1),
    (1, 1),
    (0, 0),
)
"""(x, y) of the crops, from -1 (left, top) to 1; each is also mirrored."""


class SeededDraws:
    """Random numbers for B images, each from a generator of its own.

    Every call draws once per image, so the order of the calls decides which numbers they give.

    Args:
        seeds: B integers, not negative.
        device: of the tensors that are returned.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.device = device

    def uniform(self, low: float, high: float) -> Tensor:
        """float32 (B,) in [low, high)."""
        found = [rng.uniform(low, high) for rng in self.generators]
        return torch.tensor(found, dtype=torch.float32, device=self.device)

    def bernoulli(self, probability: float) -> Tensor:
        """bool (B,), True with this probability."""
        return self.uniform(0.0, 1.0) < probability

    def integers(self, end: int) -> Tensor:
        """int64 (B,) in [0, end)."""
        found = [int(rng.integers(end)) for rng in self.generators]
        return torch.tensor(found, device=self.device)

    def permutations(self, length: int) -> Tensor:
        """int64 (B, length): the numbers 0 to length - 1, shuffled."""
        found = np.stack([rng.permutation(length) for rng in self.generators])
        return torch.from_numpy(found).to(self.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """float32 (B, *shape), standard normal."""
        found = [rng.standard_normal(tuple(shape), np.float32) for rng in self.generators]
        return torch.from_numpy(np.stack(found)).to(self.device)


class Augment(nn.Module):
    """Training data varied as a recipe says: uint8 (B, 3, H, W) -> uint8 (B, 3, H, W)."""

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self, images: Tensor, *, seeds: Tensor | None = None, flippable: Tensor | None = None
    ) -> Tensor:
        """Change every image.

        Args:
            images: uint8 (B, 3, H, W).
            seeds: int64 (B,), not negative; drawn from torch's global generator unless given.
            flippable: bool (B,), False where an image must not be mirrored
            (pipeline/images/mirror.py);
                None allows it for all.
        """
        config, device = self.config, images.device
        if seeds is None:
            seeds = torch.randint(2**62, (len(images),))
        draws = SeededDraws(seeds.tolist(), device)
        allowed = torch.ones(len(images), dtype=torch.bool, device=device)
        if flippable is not None:
            allowed = flippable.to(device)
        inverted = 1 - images.float() / 255  # white is 0, and so is what comes in from outside
        if config.flip:
            inverted = flip_left_right(inverted, draws.bernoulli(config.flip) & allowed)
        if config.zoom or config.rotate or config.random_crop or config.ten_crop:
            inverted = self._move(inverted, draws, allowed)
        if config.color:
            inverted = jitter_colors(inverted, draws, config.color)
        if config.blur:
            chosen = draws.bernoulli(config.blur)[:, None, None, None]
            sigma = draws.uniform(*BLUR_SIGMA)[:, None].expand(-1, 2)
            inverted = torch.where(chosen, gaussian_blur2d(inverted, (5, 5), sigma), inverted)
        if config.shift:
            inverted = shift_whole_pixels(inverted, config.shift, draws)
        if config.swap_channels:
            order = draws.permutations(images.shape[1])
            order = torch.where(
                draws.bernoulli(config.swap_channels)[:, None], order, order.sort(1).values
            )
            inverted = inverted.gather(1, order[:, :, None, None].expand_as(inverted))
        inverted = self._cut_and_mix(inverted, draws)
        if config.noise:
            sigma = draws.uniform(0.0, config.noise)[:, None, None, None]
            inverted = inverted + sigma * draws.normal(images.shape[1:])
        return ((1 - inverted).clamp(0, 1) * 255).round().to(torch.uint8)

    def _move(self, images: Tensor, draws: SeededDraws, allowed: Tensor) -> Tensor:
        """Zoom, rotation and crops together, so that pixels are interpolated only once."""
        config, ones = self.config, torch.ones(len(images), device=images.device)
        width, height, x, y = ones, ones, 0 * ones, 0 * ones
        if config.random_crop:
            area = draws.uniform(config.random_crop, 1.0)
            ratio = draws.uniform(*map(math.log, CROP_RATIO)).exp()
            width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
            x, y = ((1 - side) * draws.uniform(-1.0, 1.0) for side in (width, height))
        if config.ten_crop:
            which = draws.integers(10)
            images = flip_left_right(images, (which >= 5) & allowed)
            centres = torch.tensor(TEN_CROP_CENTRES, device=images.device)[which % 5]
            width = height = config.ten_crop * ones
            x, y = ((1 - config.ten_crop) * centre for centre in centres.float().unbind(1))
        angle, scale = 0 * ones, ones
        if config.rotate:
            angle = torch.deg2rad(draws.uniform(-config.rotate, config.rotate))
        if config.zoom:
            scale = draws.uniform(1 - config.zoom, 1 + config.zoom)
        return resample(images, width / scale, height / scale, x, y, angle)

    def _cut_and_mix(self, images: Tensor, draws: SeededDraws) -> Tensor:
        """MixUp and CutMix with the image half a batch away, then a white square (cutout)."""
        config = self.config
        if config.mixup:
            kept = torch.where(draws.bernoulli(config.mixup), draws.uniform(0.0, 1.0), 1.0)
            kept = kept[:, None, None, None]
            images = kept * images + (1 - kept) * images.roll(len(images) // 2, 0)
        if config.cutmix:
            side = draws.uniform(0.0, 1.0).sqrt() * draws.bernoulli(config.cutmix)
            box = random_squares(images.shape[-1], side, draws)
            images = torch.where(box, images.roll(len(images) // 2, 0), images)
        if config.cutout:
            box = random_squares(images.shape[-1], draws.uniform(0.0, config.cutout), draws)
            images = images.masked_fill(box, 0.0)
        return images


def differentiable_augmentation() -> nn.Module:
    """Colour, translation and cutout through which gradients flow: float (B, 3, H, W) in [0, 1].

    A GAN changes real and generated images alike before the discriminator sees them. So the
    discriminator cannot memorise a small data set, and the generator does not learn to draw the
    changes. Each call draws from torch's global generator; black comes in where an image moves.

    Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training"
    (arXiv 2006.10738), section 3.2.
    """
    return K.AugmentationSequential(
        K.ColorJitter(0.25, 0.25, 0.5, 0.0, p=1.0),
        K.RandomAffine(0.0, translate=(0.125, 0.125), p=1.0),
        K.RandomErasing((0.05, 0.2), (0.5, 2.0), p=0.5),
        data_keys=["input"],
    )


def flip_left_right(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B, C, H, W), mirrored where `chosen`, bool (B,), is True."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def resample(
    images: Tensor, width: Tensor, height: Tensor, x: Tensor, y: Tensor, angle: Tensor
) -> Tensor:
    """Enlarge, shrink or turn a part of each image to the whole, with bilinear interpolation.

    Args:
        images: float (B, C, H, W); zeros come in from outside.
        width, height: float (B,), of the part, in sides of the image; more than 1 shrinks.
        x, y: float (B,), the part's centre, from -1 to 1 over the image; 0 is the middle.
        angle: float (B,), radians that the image turns by, counterclockwise.
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
        images: float.
        share: a crop's side, as a share of the image's; every crop is enlarged to H x W.
    """
    B = len(images)
    crops = []
    for source in (images, images.flip(3)):
        for centre in TEN_CROP_CENTRES:
            side = torch.full((B,), share, device=images.device)
            x, y = (torch.full_like(side, (1 - share) * c) for c in centre)
            crops.append(resample(source, side, side, x, y, torch.zeros_like(side)))
    return torch.stack(crops, 1)


def jitter_colors(images: Tensor, draws: SeededDraws, strength: float) -> Tensor:
    """Change brightness, contrast, saturation and hue of most images.

    Args:
        images: float (B, 3, H, W) in [0, 1], inverted: white is 0.
        draws: how much each image is changed.
        strength: from 0 to 1.
    """
    chosen = draws.bernoulli(COLOR_PROBABILITY)[:, None, None, None]
    most = 0.4 * strength
    changed = adjust_brightness(images, draws.uniform(-most, most))
    changed = adjust_contrast(changed, draws.uniform(1 - most, 1 + most))
    changed = adjust_saturation(changed, draws.uniform(1 - most, 1 + most))
    changed = adjust_hue(changed, 2 * math.pi * draws.uniform(-0.1 * strength, 0.1 * strength))
    return torch.where(chosen, changed, images)


def random_squares(size: int, side: Tensor, draws: SeededDraws) -> Tensor:
    """A square in each image, bool (B, 1, size, size): True inside.

    Args:
        size: pixels per side of the images.
        side: float (B,), of the squares, as a share of the images'.
        draws: where each square lies.
    """
    pixels = (side * size).round()
    left, top = ((size - pixels) * draws.uniform(0.0, 1.0) for _ in range(2))
    position = torch.arange(size, device=side.device)
    columns, rows = (
        (position >= first.round()[:, None]) & (position < (first.round() + pixels)[:, None])
        for first in (left, top)
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def shift_whole_pixels(images: Tensor, limit: int, draws: SeededDraws) -> Tensor:
    """Move each image (B, C, H, W) by up to `limit` pixels in both directions; zeros come in.

    By whole pixels, because interpolation would teach a tokenizer to blur.
    """
    B, C, H, W = images.shape
    device = images.device
    padded = F.pad(images, [limit] * 4)
    top, left = draws.integers(2 * limit + 1), draws.integers(2 * limit + 1)
    rows = top[:, None] + torch.arange(H, device=device)
    columns = left[:, None] + torch.arange(W, device=device)
    image = torch.arange(B, device=device)[:, None, None, None]
    channel = torch.arange(C, device=device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
