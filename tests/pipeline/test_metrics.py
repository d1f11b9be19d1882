"""Metrics against their references, and what they say of real images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from pipeline.contracts import Interval
from pipeline.evaluation.features import ImageNetFeatures
from pipeline.metrics import (
    PolynomialKernels,
    kid,
    kid_gain,
    kid_interval,
    mean_interval,
    nearest_distance,
    paired_gain,
    psnr,
    resample,
    retrieval_at_1,
    ssim,
    unbiased_mmd2,
)

BOOTSTRAP = {"bootstrap": 400, "seed": 0}


def sets(shift: float, count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, count, 16, generator=generator)
    return real, generated + shift


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_kid_is_torchmetrics(shift: float) -> None:
    real, generated = sets(shift)
    expected = poly_mmd(real.double(), generated.double())
    assert kid(real, generated) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_kids_interval_covers_nothing_for_alike_and_excludes_it_for_unlike() -> None:
    alike, unlike = (kid_interval(*sets(shift), **BOOTSTRAP) for shift in (0.0, 1.0))
    assert alike.low < 0 < alike.high and alike.low < alike.value < alike.high
    assert 0 < unlike.low < unlike.value < unlike.high


def test_resampling_does_not_bias_kid() -> None:
    """A plain bootstrap compares an image with its own copy, which lifts every resample."""
    real, generated = sets(0.0)
    draws = [resample(60, bootstrap=4_000, seed=seed) for seed in (0, 1)]
    resampled = unbiased_mmd2(PolynomialKernels(real, generated), *draws)
    assert resampled.mean() == pytest.approx(
        kid(real, generated), abs=4 * resampled.std() / 4_000**0.5
    )


def test_kid_gain_is_signed_and_paired() -> None:
    real, far = sets(1.0)
    near = far - 0.9
    gain = kid_gain(real, far, near, **BOOTSTRAP)
    assert gain.value == pytest.approx(kid(real, far) - kid(real, near))
    assert gain.low > 0
    assert kid_gain(real, far, far, **BOOTSTRAP) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="60 and 59"):
        kid_gain(real, far, near[:59], **BOOTSTRAP)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=40))
def test_a_means_interval_holds_the_mean_within_the_data(values: list[float]) -> None:
    found = mean_interval(np.array(values), **BOOTSTRAP)
    assert found.value == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_a_means_interval_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = mean_interval(values, bootstrap=2_000, seed=0)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_paired_gain_sees_what_intervals_alone_do_not() -> None:
    before = np.arange(200) % 5 == 0
    after = before | (np.arange(200) % 20 == 1)
    gain = paired_gain(before.astype(float), after.astype(float), **BOOTSTRAP)
    assert gain.value == pytest.approx(0.05) and gain.low > 0
    old, new = mean_interval(before, **BOOTSTRAP), mean_interval(after, **BOOTSTRAP)
    assert new.low < old.high, "the plain intervals overlap"
    with pytest.raises(ValueError, match="200 and 100"):
        paired_gain(before, after[:100], **BOOTSTRAP)


def test_retrieval_finds_its_own_among_distractors() -> None:
    captions = F.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert retrieval_at_1(captions[:6], captions).tolist() == [1.0] * 6
    assert retrieval_at_1(captions[:6], captions.roll(1, 0)).sum() == 0
    collapsed = captions[:1].expand(6, -1)
    assert retrieval_at_1(collapsed, captions).sum() == 1, "one image for all is no skill"


def test_psnr_and_ssim_of_every_pair() -> None:
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    targets = images.clone()
    targets[1] += 10
    np.testing.assert_allclose(psnr(images, targets)[1], 20 * np.log10(25.5), rtol=1e-5)
    assert psnr(images, targets)[0] > 60
    similarity = ssim(images, targets)
    assert similarity[0] == pytest.approx(1) and similarity[0] > similarity[1]


def test_a_blurred_copy_is_nearer_than_any_new_icon(icon_images: Tensor) -> None:
    training, new = icon_images[:48], icon_images[48:64]
    copies = F.interpolate(F.avg_pool2d(training[:16].float(), 2), 64, mode="bilinear")
    of_copies = nearest_distance(copies.to(torch.uint8), training)
    assert of_copies.max() < 0.03 < np.median(nearest_distance(new, training))
    assert nearest_distance(training, training).max() == pytest.approx(0, abs=1e-3)


def test_imagenet_features_order_real_images_as_eyes_do(icon_images: Tensor) -> None:
    features = ImageNetFeatures(128)
    noto = icon_images[:64]
    generator = torch.Generator().manual_seed(0)
    nonsense = torch.randint(0, 256, (32, 3, 64, 64), generator=generator, dtype=torch.uint8)
    noisy = (noto + 40 * torch.randn(noto.shape, generator=generator)).clamp(0, 255)
    half = features(noto[::2])
    assert half.shape == (32, 1280) and half.dtype == torch.float32
    others = (noto[1::2], noisy[1::2].to(torch.uint8), nonsense)
    same, noise, worst = (kid(half, features(images)) for images in others)
    assert abs(same) < 0.1 < noise < worst
