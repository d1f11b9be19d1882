"""The perceptual loss: zero for equals, blind to padding tricks, and worse for blur than noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import PretrainedNotFoundError
from pipeline.images.pixels import to_float
from pipeline.training.perceptual import CAFFE_MEAN_BGR, PerceptualLoss

SHAPES = {
    "conv1_1": (64, 3), "conv1_2": (64, 64), "conv2_1": (128, 64), "conv2_2": (128, 128),
    "conv3_1": (256, 128),
}  # fmt: skip


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> PerceptualLoss:
    """Random weights of VGG's shapes: enough for everything but what features mean."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, (out, into) in SHAPES.items():
        kernel = torch.randn(out, into, 3, 3, generator=generator) * (2 / (9 * into)) ** 0.5
        weights |= {f"{name}.weight": kernel.half(), f"{name}.bias": torch.zeros(out).half()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(weights, path)
    return PerceptualLoss(str(path), path.parent)


def test_equal_images_are_at_distance_zero(loss: PerceptualLoss, icon_images: Tensor) -> None:
    images = to_float(icon_images[:4])
    assert loss(images, images).item() == pytest.approx(0, abs=1e-5)
    assert (loss.distance(images, images.roll(1, 0)) > 0.1).all()


def test_the_distance_is_lpips_with_uniform_weights(
    loss: PerceptualLoss, icon_images: Tensor
) -> None:
    x, y = to_float(icon_images[:2]), to_float(icon_images[64:66])
    expected = torch.zeros(2)
    for a, b in zip(loss.features(x), loss.features(y), strict=True):
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        expected += difference.square().sum(1).mean((1, 2))
    torch.testing.assert_close(loss.distance(x, y), expected, atol=1e-3, rtol=1e-3)


def test_only_the_first_image_gets_a_gradient(loss: PerceptualLoss) -> None:
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    y = torch.rand(1, 3, 16, 16, requires_grad=True)
    loss(x, y).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and y.grad is None


def test_caffes_colour_order_and_scale(loss: PerceptualLoss) -> None:
    mean_rgb = torch.tensor(CAFFE_MEAN_BGR[::-1]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    for features in loss.features(mean_rgb / 127.5 - 1):
        assert features.abs().max() < 1e-3, "the mean colour is Caffe's zero"


def test_a_file_without_vgg_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(PretrainedNotFoundError, match=r"does not hold VGG16's convolutions"):
        PerceptualLoss(str(tmp_path / "x.safetensors"), tmp_path)


def test_neither_optimisers_nor_checkpoints_see_vgg(loss: PerceptualLoss) -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.perceptual = loss

    assert not list(Objective().parameters()) and not Objective().state_dict()


@pytest.mark.slow
def test_real_features_mind_blur_more_than_noise(icon_images: Tensor, tmp_path: Path) -> None:
    """Downloads 55 MB."""
    real = PerceptualLoss("hed-vgg16", tmp_path)
    images = to_float(icon_images)
    box = torch.full((3, 1, 3, 3), 1 / 9)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), box, groups=3)
    sigma = (blurred - images).square().mean((1, 2, 3), keepdim=True).sqrt()
    noisy = images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    tinted = images + sigma
    blur, noise, tint = (float(real(x, images)) for x in (blurred, noisy, tinted))
    assert blur > 1.1 * noise > 1.1 * tint > 0
