"""Degraded images: each kind does what it says, within limits, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.images.degrade import add_noise, blur, degrade, wash_out
from pipeline.images.pixels import to_float
from pipeline.runtime import autocast


@pytest.fixture(scope="module")
def images(icon_images: Tensor) -> Tensor:
    return to_float(icon_images[:12])


def sharpness(images: Tensor) -> Tensor:
    return images.diff(dim=3).abs().mean((1, 2, 3))


def test_a_blur_is_a_gaussian_of_that_many_pixels() -> None:
    point = torch.full((2, 3, 33, 33), -1.0)
    point[:, :, 16, 16] = 1.0
    blurred = (blur(point, torch.tensor([1.0, 2.0]))[:, 0] + 1) / 2
    x = torch.arange(33.0) - 16
    for image, sigma in zip(blurred, (1.0, 2.0), strict=True):
        line = torch.exp(-(x**2) / (2 * sigma**2))
        expected = torch.outer(line, line) / line.sum() ** 2
        torch.testing.assert_close(image, expected, atol=2e-3, rtol=0)
    plain = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(blur(plain, 2.0), plain)  # edges are repeated


def test_noise_has_its_deviation_and_stays_within_black_and_white(images: Tensor) -> None:
    torch.manual_seed(0)
    grey = torch.zeros(4, 3, 64, 64)
    assert (add_noise(grey, 0.1) / 2).std().item() == pytest.approx(0.1, rel=0.02)
    noisy = add_noise(images, 0.3)
    assert noisy.min() >= -1 and noisy.max() <= 1


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_washing_out_leaves_half_the_contrast(images: Tensor, level: float) -> None:
    washed = wash_out(images, 0.5, level=level)
    torch.testing.assert_close(washed.std((1, 2, 3)), images.std((1, 2, 3)) / 2)
    mean = images.mean((1, 2, 3))
    wanted = mean if level == 0 else (mean + 1) / 2
    torch.testing.assert_close(washed.mean((1, 2, 3)), wanted, atol=1e-5, rtol=1e-5)


def test_kinds_take_turns_and_every_second_is_blurred(images: Tensor) -> None:
    torch.manual_seed(0)
    made = degrade(images)
    assert (sharpness(made[0::2]) < 0.95 * sharpness(images[0::2])).all(), "blurred"
    assert (sharpness(made[1::4]) > 1.05 * sharpness(images[1::4])).all(), "noisy"
    flat = made[3::4].std((1, 2, 3)) / images[3::4].std((1, 2, 3))
    assert ((flat > 0.29) & (flat < 0.66)).all(), "washed out"
    torch.manual_seed(0)
    assert torch.equal(degrade(images), made)
    assert degrade(images[:0]).shape == (0, 3, 64, 64)


def test_mixed_precision_does_not_round_them(images: Tensor) -> None:
    torch.manual_seed(0)
    wanted = degrade(images)
    torch.manual_seed(0)
    with autocast(images.device):
        made = degrade(images)
    assert made.dtype == torch.float32 and torch.equal(made, wanted)


def test_a_larger_image_is_blurred_by_as_large_a_share(images: Tensor) -> None:
    large = F.interpolate(images, scale_factor=2, mode="bilinear")
    torch.manual_seed(0)
    small = degrade(images)[0::2]
    torch.manual_seed(0)
    shrunk = F.interpolate(degrade(large)[0::2], scale_factor=0.5, mode="area")
    assert (small - shrunk).abs().mean() < 0.02
