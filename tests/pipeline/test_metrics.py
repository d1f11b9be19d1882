"""Metrics against their references, and what they say of real images."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.contracts import Interval
from pipeline.evaluation.features import ImageNetFeatures
from pipeline.metrics import (
    Kernels,
    alignment,
    cmmd,
    fid,
    gradient_energy,
    kid,
    kid_gain,
    kid_interval,
    mean_interval,
    nearest_neighbours,
    paired_gain,
    polynomial_kernel,
    psnr,
    recall_at_k,
    resample,
    sharpness,
    ssim,
    unbiased_mmd2,
)

BOOTSTRAP = {"bootstrap": 400, "seed": 0}


def sets(shift: float, count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, count, 16, generator=generator)
    return real, generated + shift


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_kid_is_torchmetrics(shift: float) -> None:
    real, generated = sets(shift)
    reference = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=len(real))
    reference.update(real.double(), real=True)
    reference.update(generated.double(), real=False)
    expected, _ = reference.compute()
    assert kid(real, generated) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


class _Features(nn.Identity):
    num_features = 16


@pytest.mark.parametrize("count", [60, 12], ids=["regular", "fewer images than features"])
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_fid_is_torchmetrics(shift: float, count: int) -> None:
    real, generated = sets(shift, count)
    generated = generated[: count - 2] * 1.5
    reference = FrechetInceptionDistance(_Features())
    reference.update(real.double(), real=True)
    reference.update(generated.double(), real=False)
    # the eigenvalues of a singular product that should be zero, but are not, add up
    assert fid(real, generated) == pytest.approx(float(reference.compute()), rel=1e-6)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=f"{count} and 1"):
        fid(real, generated[:1])


def test_cmmd_is_its_definition() -> None:
    real, generated = sets(0.5, 20)
    x, y = (F.normalize(z.double(), dim=1).tolist() for z in (real, generated))

    def mean_kernel(a: list[list[float]], b: list[list[float]], skip_self: bool) -> float:
        values = [
            math.exp(-(math.dist(p, q) ** 2) / (2 * 10**2))
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (skip_self and i == j)
        ]
        return sum(values) / len(values)

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)
    assert cmmd(real, generated) == pytest.approx(1_000 * expected, rel=1e-6)
    assert cmmd(3 * real, generated) == pytest.approx(cmmd(real, generated), rel=1e-6)
    alike = cmmd(*sets(0.0, 20))
    assert abs(alike) < 0.2 * cmmd(real, generated)


def test_kids_interval_covers_nothing_for_alike_and_excludes_it_for_unlike() -> None:
    alike, unlike = (kid_interval(*sets(shift), **BOOTSTRAP) for shift in (0.0, 1.0))
    assert alike.low < 0 < alike.high and alike.low < alike.value < alike.high
    assert 0 < unlike.low < unlike.value < unlike.high


def test_resampling_does_not_bias_kid() -> None:
    """A plain bootstrap compares an image with its own copy, which lifts every resample."""
    real, generated = sets(0.0)
    draws = [resample(60, bootstrap=4_000, seed=seed) for seed in (0, 1)]
    resampled = unbiased_mmd2(Kernels(real, generated, polynomial_kernel), *draws)
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


def test_a_higher_level_encloses_a_lower_one() -> None:
    values = np.random.default_rng(0).normal(size=100)
    real, generated = sets(0.5)
    for estimate in (
        lambda level: mean_interval(values, bootstrap=2_000, seed=0, level=level),
        lambda level: paired_gain(values, values**2, bootstrap=2_000, seed=0, level=level),
        lambda level: kid_interval(real, generated, bootstrap=2_000, seed=0, level=level),
        lambda level: kid_gain(real, real, generated, bootstrap=2_000, seed=0, level=level),
    ):
        narrow, usual, wide = (estimate(level) for level in (0.5, 0.95, 0.99))
        assert wide.low < usual.low < narrow.low <= narrow.value
        assert narrow.value <= narrow.high < usual.high < wide.high
    usual = mean_interval(values, **BOOTSTRAP)
    assert usual == mean_interval(values, **BOOTSTRAP, level=0.95)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_a_number_is_never_dropped(wrong: float) -> None:
    values, good = np.linspace(0, 1, 20), np.linspace(0, 1, 20)
    values[3] = wrong
    real, generated = sets(0.5, 20)
    broken = generated.clone()
    broken[3, 2] = wrong
    found = [
        mean_interval(values, **BOOTSTRAP),
        mean_interval(np.array([]), **BOOTSTRAP),
        paired_gain(good, values, **BOOTSTRAP),
        paired_gain(values, good, **BOOTSTRAP),
        kid_interval(real, broken, **BOOTSTRAP),
        kid_interval(broken, real, **BOOTSTRAP),
        kid_gain(real, broken, generated, **BOOTSTRAP),
        kid_gain(real, generated, broken, **BOOTSTRAP),
    ]
    for one in found:
        assert np.isnan([one.value, one.low, one.high]).all(), one
    assert math.isnan(fid(real, broken)) and math.isnan(fid(broken, real))
    assert math.isnan(cmmd(real, broken)) and math.isnan(kid(real, broken))


def embeddings(count: int) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(0)), dim=1)


def test_retrieval_finds_its_own_among_distractors() -> None:
    captions = embeddings(10)
    assert recall_at_k(captions[:6], captions, 1).tolist() == [1.0] * 6
    assert recall_at_k(captions[:6], captions.roll(1, 0), 1).sum() == 0
    collapsed = captions[:1].expand(6, -1)
    assert recall_at_k(collapsed, captions, 1).sum() == 1, "one image for all is no skill"
    assert recall_at_k(captions[:6], collapsed, 1).sum() == 0, "nor is one caption for all"
    with pytest.raises(ValueError, match="10 images have only 6 captions"):
        recall_at_k(captions, captions[:6], 1)


def test_recall_grows_with_k_to_certainty() -> None:
    captions = embeddings(40)
    images = F.normalize(captions[:30] + 0.5 * captions.roll(7, 0)[:30], dim=1)
    images = F.normalize(images + 0.2 * captions.flip(0)[:30], dim=1)
    similarity = (images @ captions.T).tolist()
    ranks = [sorted(row, reverse=True).index(row[i]) for i, row in enumerate(similarity)]
    for k in (1, 2, 5, 40):
        assert recall_at_k(images, captions, k).tolist() == [float(rank < k) for rank in ranks]
    assert 0 < recall_at_k(images, captions, 1).mean() < 1
    assert recall_at_k(images, captions, 40).all()


def test_alignment_is_the_cosine_to_the_own_caption() -> None:
    captions = embeddings(10)
    assert alignment(captions[:6], captions) == pytest.approx(np.ones(6))
    assert alignment(-captions, captions) == pytest.approx(-np.ones(10))
    expected = F.cosine_similarity(captions[:6], captions[1:7]).numpy()
    assert alignment(captions[:6], captions[1:]) == pytest.approx(expected, rel=1e-5)


def test_an_embedding_that_is_not_a_number_stays_so() -> None:
    captions, images = embeddings(10), embeddings(10)[:6].clone()
    images[2] = math.nan
    for values in (recall_at_k(images, captions, 5), alignment(images, captions)):
        assert np.isnan(values).tolist() == [False, False, True, False, False, False]


def test_psnr_and_ssim_of_every_pair() -> None:
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    targets = images.clone()
    targets[1] += 10
    np.testing.assert_allclose(psnr(images, targets)[1], 20 * np.log10(25.5), rtol=1e-5)
    assert psnr(images, targets)[0] > 60
    similarity = ssim(images, targets)
    assert similarity[0] == pytest.approx(1) and similarity[0] > similarity[1]


def test_sharpness_falls_with_blur_and_with_noise(icon_images: Tensor) -> None:
    real = icon_images[:48]
    assert sharpness(real, real).tolist() == [1.0] * 48
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    blurred = [gaussian_blur2d(real.float(), 9, (s, s)).byte() for s in (0.4, 0.6, 1.0, 2.0)]
    noised = [(real + s * noise).clamp(0, 255).byte() for s in (8, 16, 32, 64)]
    for series, sign in ((blurred, -1), (noised, 1)):
        scores = [sharpness(images, real) for images in series]
        means = [1.0, *(score.mean() for score in scores)]
        assert all(before - after > 0.02 for before, after in pairwise(means))
        each = np.stack(scores)
        assert (np.diff(each, axis=0) < 0).mean() > 0.95, "every image, not their mean alone"
        energy = gradient_energy(series[-1]) - gradient_energy(real)
        assert (sign * energy > 0).mean() > 0.95


def test_sharpness_of_plain_images() -> None:
    plain = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    other = plain.clone()
    other[1, :, 8:] = 0
    assert sharpness(other, plain).tolist() == [1.0, 0.0] == sharpness(plain, other).tolist()
    step = 255 * math.sqrt(1 / 16)
    assert gradient_energy(other).tolist() == pytest.approx([0.0, step])
    with pytest.raises(ValueError, match=r"\[2, 3, 16, 16\] and \[1, 3, 16, 16\]"):
        sharpness(other, plain[:1])


def test_a_blurred_copy_is_nearer_than_any_new_icon(icon_images: Tensor) -> None:
    training, new = icon_images[:48], icon_images[48:64]
    copies = F.interpolate(F.avg_pool2d(training[:16].float(), 2), 64, mode="bilinear")
    distances, indices = nearest_neighbours(copies.to(torch.uint8), training)
    assert indices.tolist() == list(range(16))
    assert distances.max() < 0.03 < np.median(nearest_neighbours(new, training)[0])
    assert nearest_neighbours(training, training)[0].max() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 48, 1_000])
def test_neighbours_do_not_depend_on_the_chunk(icon_images: Tensor, chunk: int) -> None:
    training, new = icon_images[:48], icon_images[48:64]
    distances, indices = nearest_neighbours(new, training, chunk=chunk)
    small = [F.avg_pool2d(images / 255, 4) for images in (new, training)]
    expected = [[float((a - b).square().mean().sqrt()) for b in small[1]] for a in small[0]]
    assert indices.tolist() == np.argmin(expected, axis=1).tolist()
    assert distances == pytest.approx(np.min(expected, axis=1), rel=1e-4)


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
