"""Augmentation: what each effect does, seeds that decide alone, and what is never mirrored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import AugmentConfig, EncodeConfig, Recipe
from pipeline.images.augment import (
    Augment,
    SeededDraws,
    differentiable_augmentation,
    flip_left_right,
    random_squares,
    resample,
    ten_crops,
)
from pipeline.images.mirror import may_mirror

EFFECTS = {
    "flip": 0.5, "zoom": 0.3, "rotate": 20.0, "random_crop": 0.4, "ten_crop": 0.75, "shift": 6,
    "color": 0.8, "swap_channels": 0.8, "blur": 0.9, "noise": 0.2, "cutout": 0.5, "mixup": 0.8,
    "cutmix": 0.8,
}  # fmt: skip
ALL = AugmentConfig(**{name: value for name, value in EFFECTS.items() if name != "ten_crop"})


def only(**settings: Any) -> Augment:
    return Augment(AugmentConfig(**{"flip": 0.0, **settings}))


@pytest.fixture
def images(icon_images: Tensor) -> Tensor:
    """uint8 (16, 3, 64, 64)."""
    return icon_images[:16]


@pytest.mark.parametrize("name", EFFECTS)
def test_every_effect_changes_images_and_obeys_its_seeds(name: str, images: Tensor) -> None:
    augment, seeds = only(**{name: EFFECTS[name]}), torch.arange(16)
    found = augment(images, seeds=seeds)
    assert found.dtype == torch.uint8 and found.shape == images.shape
    assert (found != images).flatten(1).any(1).sum() >= 3
    assert torch.equal(augment(images, seeds=seeds), found)
    assert not torch.equal(augment(images, seeds=seeds + 1), found)


def test_without_any_effect_nothing_changes(images: Tensor) -> None:
    assert torch.equal(only()(images), images)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_result_does_not_depend_on_the_number_of_workers(
    world_size: int, images: Tensor
) -> None:
    seeds = 1000 + torch.arange(16)
    whole = Augment(ALL)(images, seeds=seeds)
    shares = [
        Augment(ALL)(images[rank::world_size], seeds=seeds[rank::world_size])
        for rank in range(world_size)
    ]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)


def test_seeds_come_from_the_global_generator_unless_given(images: Tensor) -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = Augment(ALL)(images)
        return found

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("settings", [{"flip": 1.0}, {"ten_crop": 1.0}])
def test_only_what_may_be_mirrored_is(settings: dict[str, float], images: Tensor) -> None:
    flippable = torch.arange(16) % 2 == 0
    found = only(**settings)(images, seeds=torch.arange(16), flippable=flippable)
    flipped = (found == images.flip(3)).flatten(1).all(1)
    kept = (found == images).flatten(1).all(1)
    assert kept[1::2].all() and (flipped | kept).all() and flipped[::2].sum() >= 2


def test_white_comes_in_from_outside() -> None:
    black = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    moved = only(rotate=45, zoom=0.5, shift=4)(black, seeds=torch.arange(8))
    corners = moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert moved.amax() == 255 and (corners == 255).float().mean() > 0.4
    assert set(only(cutout=0.5)(black, seeds=torch.arange(8)).unique().tolist()) == {0, 255}


def test_resampling_against_exact_copies() -> None:
    images = torch.rand(3, 3, 16, 16)
    one, none = torch.ones(3), torch.zeros(3)
    same = resample(images, one, one, none, none, none)
    torch.testing.assert_close(same, images)
    quarter = resample(images, one, one, none, none, torch.full((3,), torch.pi / 2))
    torch.testing.assert_close(quarter, images.rot90(1, (2, 3)), rtol=1e-4, atol=1e-4)
    corner = resample(images, one / 2, one / 2, none - 0.5, none - 0.5, none)
    inner = torch.nn.functional.interpolate(images[:, :, :8, :8], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(corner[:, :, 1:-1, 1:-1], inner[:, :, 1:-1, 1:-1], rtol=0, atol=0.5)
    torch.testing.assert_close(corner[:, :, 1:-2, 1:-2], inner[:, :, 1:-2, 1:-2])


def test_ten_crops_are_five_and_their_mirror_images() -> None:
    images = torch.rand(2, 3, 32, 32)
    crops = ten_crops(images, 0.75)
    assert crops.shape == (2, 10, 3, 32, 32)
    mirrored = ten_crops(images.flip(3), 0.75)
    torch.testing.assert_close(crops[:, 5:], mirrored[:, :5])
    torch.testing.assert_close(crops[:, 4].flip(3), crops[:, 9], rtol=1e-4, atol=1e-4)
    assert torch.equal(flip_left_right(images, torch.tensor([True, False]))[1], images[1])


def test_a_square_has_its_side_and_lies_within() -> None:
    side = torch.tensor([0.0, 0.25, 1.0])
    square = random_squares(16, side, SeededDraws([1, 2, 3], side.device))
    assert square.flatten(1).sum(1).tolist() == [0, 16, 256]


def test_mixtures_are_of_two_images(images: Tensor) -> None:
    partner = images.roll(8, 0)
    mixed = only(mixup=1.0)(images, seeds=torch.arange(16)).float()
    low, high = torch.minimum(images, partner).float(), torch.maximum(images, partner).float()
    assert (mixed >= low - 1).all() and (mixed <= high + 1).all()
    cut = only(cutmix=1.0)(images, seeds=torch.arange(16))
    assert ((cut == images) | (cut == partner)).all()


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("red apple", True), ("a big dog", True), ("I love A cat", True), ("bright lights", True),
        ("the upright piano", True), ("cleft", True), ("红苹果", True), ("东西", True),
        ("backhand index pointing left", False), ("right-facing fist", False),
        ("clockwise vertical arrows", False), ("flag: France", False), ("旗: 中国", False),
        ("反手食指向左指", False), ("keycap: 1", False), ("OK hand", False), ("B button", False),
        ("SOS", False), ('a sign that says "stop"', False), ("two o’clock", False),
        ("输入拉丁字母", False), ("a newspaper", False),
    ],
)  # fmt: skip
def test_what_may_be_mirrored(caption: str, mirrored: bool) -> None:
    assert may_mirror([caption]) is mirrored
    assert may_mirror(["red apple", caption]) is mirrored


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        AugmentConfig(random_crop=0.5, ten_crop=0.8)
    with pytest.raises(ValueError, match="a mixture has no caption"):
        Recipe(name="x", encode=EncodeConfig(num_views=2, augment=AugmentConfig(mixup=0.5)))


def test_gradients_flow_through_the_augmentation_of_a_gan() -> None:
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    changed = differentiable_augmentation()(images)
    assert changed.shape == images.shape and not torch.equal(changed, images)
    (gradient,) = torch.autograd.grad(changed.sum(), images)
    assert gradient.abs().flatten(1).sum(1).all(), "every image's pixels get one"
