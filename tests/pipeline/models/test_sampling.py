"""Guidance, noise and schedules, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.contracts import MAX_SEED
from pipeline.models.decoding import sampling
from pipeline.models.networks.attention import attention


def test_cosine_schedule_begins_hidden_and_ends_known() -> None:
    ratio = sampling.cosine_mask_ratio(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, math.cos(math.pi / 4), 0.0]))


@pytest.mark.parametrize("rectangles", [0.0, 1.0])
def test_masks_hide_a_cosine_share(rectangles: float) -> None:
    torch.manual_seed(0)
    masks = sampling.random_masks(
        4000, 8, rectangle_fraction=rectangles, device=torch.device("cpu")
    )
    assert masks.shape == (4000, 64) and masks.any(1).all()
    assert masks.float().mean().item() == pytest.approx(2 / math.pi, abs=0.03)


def test_rectangles_are_rectangles() -> None:
    torch.manual_seed(0)
    masks = sampling.random_masks(50, 8, rectangle_fraction=1.0, device=torch.device("cpu"))
    for mask in masks.view(-1, 8, 8):
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])


def test_token_dropout_has_every_rate_to_the_largest() -> None:
    torch.manual_seed(0)
    rates = sampling.token_dropout(torch.zeros(4000, 64), 0.5).float().mean(1)
    assert rates.mean().item() == pytest.approx(0.25, abs=0.01)
    for share in (0.1, 0.25, 0.4):
        assert (rates < share).float().mean().item() == pytest.approx(share / 0.5, abs=0.05)
    assert not sampling.token_dropout(torch.zeros(9, 64), 0.0).any()


def test_guidance_interpolates_and_extrapolates() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 5)
    scale = torch.tensor([0.0, 1.0, 3.0])
    guided = sampling.classifier_free_guidance(conditional, unconditional, scale)
    torch.testing.assert_close(guided[0], unconditional[0])
    torch.testing.assert_close(guided[1], conditional[1])
    torch.testing.assert_close(guided[2], 3 * conditional[2] - 2 * unconditional[2])


def test_guidance_may_rise_to_its_scale() -> None:
    scale, progress = torch.tensor([3.0, 3.0, 1.0]), torch.tensor([0.25, 1.0, 0.5])
    assert sampling.guidance_scale_at(scale, progress, "constant").tolist() == [3, 3, 1]
    assert sampling.guidance_scale_at(scale, progress, "linear").tolist() == [1.5, 3, 1]


def test_noise_is_gumbel_and_each_row_is_its_own() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    noise = sampling.gumbel_noise(sampling.uniform_noise([100_000], generators(1)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    pair = sampling.uniform_noise([3, 7], generators(1, 2))
    assert torch.equal(pair[3:], sampling.uniform_noise([7], generators(2)))
    assert torch.isfinite(sampling.gumbel_noise(torch.tensor([0.0, 1 - 2**-24]))).all()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0, 0.5]])
    for temperature in (0.5, 1.0, 2.0):
        drawn = sampling.categorical(
            logits.expand(200_000, -1), torch.full((200_000,), temperature), torch.rand(200_000)
        )
        shares = drawn.bincount(minlength=5) / len(drawn)
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(0), atol=5e-3, rtol=0)
    some = logits[:, [2, 0, 1, 3, 2]]  # the first and the last are impossible
    ends = sampling.categorical(some.expand(3, -1), torch.ones(3), torch.tensor([0, 0.5, 1.0]))
    assert ends.tolist()[::2] == [1, 3]
    mixed = sampling.categorical(
        logits.expand(2, -1), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])
    )
    assert mixed.tolist() == [3, 0], "without temperature the likeliest"


@pytest.mark.parametrize("temperature", [1e-44, 1e-38, 1e-20, 1e-5])
def test_hardly_any_temperature_is_none(temperature: float) -> None:
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    drawn = sampling.categorical(logits, torch.full((64,), temperature), torch.rand(64))
    assert torch.equal(drawn, logits.argmax(-1))


def test_seeds_of_any_length_have_noise_of_their_own() -> None:
    seeds = [1, 1 + 2**32, 1 + 2**33, 2**32, 0, MAX_SEED]
    noise = {tuple(torch.rand(4, generator=sampling.seeded_rng(seed)).tolist()) for seed in seeds}
    assert len(noise) == len(seeds)
    same = torch.rand(4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.rand(4, generator=sampling.seeded_rng(7)), same)


def test_the_most_confident_stay_and_the_known_are_never_lost() -> None:
    confidence = torch.tensor([[0.1, 0.9, 0.5, 0.3]])
    known = torch.tensor([[True, False, False, False]])
    kept = sampling.keep_most_confident(confidence, known, torch.tensor([2]))
    assert kept.tolist() == [[True, True, False, False]]
    everything = sampling.keep_most_confident(confidence, kept, torch.tensor([0]))
    assert everything.all()


def test_attention_is_the_fused_kernels() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.rand(2, 1, 1, 7) < 0.6
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v, mask), expected)
