"""Decoding step by step: pictures to go on from, what guidance leads away from, rows that leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.bundles.bundle import load_generator
from pipeline.config import TrainConfig
from pipeline.contracts import Canvas, ContinuousBatch, GenerationRequest, SteppedGenerator
from pipeline.errors import RequestError
from pipeline.models.decoding.sampling import tokens_under
from pipeline.training.policy import apply_policy

REQUEST = GenerationRequest("红苹果", seed=7, style="noto")
RAMP = torch.arange(64 * 64 * 3).remainder(251).to(torch.uint8).view(64, 64, 3)
CORNER = torch.zeros(64, 64, dtype=torch.uint8)
CORNER[40:, 40:] = 1


@pytest.fixture(scope="module")
def generator(tiny_bundle: Path, pretrained_cache: Path) -> Any:
    """Random weights, enlarged so that captions and noise matter."""
    loaded = load_generator(tiny_bundle, pretrained_cache=pretrained_cache, device="cpu")
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():  # type: ignore[attr-defined]
        nn.init.normal_(parameter, std=0.15)
    return loaded


def canvas(mask: Tensor | None = CORNER, **settings: Any) -> Canvas:
    return Canvas(
        RAMP.numpy().tobytes(), None if mask is None else mask.numpy().tobytes(), **settings
    )


def test_a_mask_touches_whole_tokens() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3, 3] = True
    assert tokens_under(mask, 4).nonzero().flatten().tolist() == [5]


def test_what_is_not_masked_stays_and_the_rest_is_drawn(generator: Any) -> None:
    edit = replace(REQUEST, canvas=canvas())
    first, second = generator.generate([edit, replace(edit, seed=8)])
    original, outside = RAMP.permute(2, 0, 1), CORNER == 0
    for picture in (first, second):
        assert torch.equal(picture[:, outside], original[:, outside])
    assert not torch.equal(first[:, ~outside], original[:, ~outside])
    assert not torch.equal(first, second)
    assert torch.equal(generator.generate([REQUEST, edit])[1], first), "whatever the batch"


def test_kept_tokens_are_seen(generator: Any) -> None:
    """The hole is filled otherwise when its surroundings are others."""
    bright = Canvas(bytes([255]) * (64 * 64 * 3), canvas().mask)
    there, elsewhere = generator.generate(
        [replace(REQUEST, canvas=canvas()), replace(REQUEST, canvas=bright)]
    )
    assert not torch.equal(there[:, CORNER == 1], elsewhere[:, CORNER == 1])


def test_a_variation_keeps_a_share_of_the_tokens_and_needs_no_prompt(generator: Any) -> None:
    asked = [GenerationRequest("", seed, canvas=canvas(None, share=0.25)) for seed in (1, 2)]
    batch = generator.start(asked)
    first, second = (batch._states[row].canvas.hidden for row in (0, 1))
    assert first.sum() == second.sum() == 16 and not torch.equal(first, second)
    pictures = generator.generate(asked)
    assert not torch.equal(pictures[0], pictures[1])


def test_a_rising_guidance_is_another_picture_unless_nothing_guides(generator: Any) -> None:
    requests = [REQUEST, replace(REQUEST, guidance_scale=1.0)]
    plain, config = generator.generate(requests), generator.config
    generator.config = config.model_copy(update={"guidance_schedule": "linear"})
    rising = generator.generate(requests)
    generator.config = config
    assert not torch.equal(rising[0], plain[0]) and torch.equal(rising[1], plain[1])


def test_rows_that_leave_do_not_change_the_others(generator: Any) -> None:
    assert isinstance(generator, SteppedGenerator)
    alone = generator.generate([REQUEST])[0]
    batch = generator.start([replace(REQUEST, seed=1), REQUEST, replace(REQUEST, num_steps=2)])
    assert batch.step() and batch.step()
    assert [batch.progress(row) for row in range(3)] == [(2, 4), (2, 4), (2, 2)]
    midway = batch.images([1])[0]
    batch.drop([0])
    while batch.step():
        pass
    assert [batch.progress(row) for row in range(3)] == [(2, 4), (4, 4), (2, 2)]
    assert torch.equal(batch.images([1])[0], alone)
    assert not torch.equal(midway, alone)


def test_a_picture_does_not_show_when_it_joined(generator: Any) -> None:
    hurried, edit = replace(REQUEST, num_steps=2), replace(REQUEST, seed=8, canvas=canvas())
    alone = [generator.generate([request])[0] for request in (REQUEST, edit, hurried)]
    batch = generator.start([REQUEST])
    assert isinstance(batch, ContinuousBatch) and batch.joinable
    batch.step()
    assert list(batch.join([edit])) == [1]
    batch.step()
    assert list(batch.join([hurried])) == [2]
    with pytest.raises(RequestError, match="num_steps"):
        batch.join([replace(REQUEST, num_steps=0)])
    assert [batch.progress(row) for row in range(3)] == [(2, 4), (1, 4), (0, 2)]
    assert batch.step() and batch.step()
    assert torch.equal(batch.images([0, 2]), torch.stack([alone[0], alone[2]]))
    batch.forget([0, 2])
    assert batch.step() and not batch.step()
    assert torch.equal(batch.images([1])[0], alone[1])
    assert list(batch.join([hurried])) == [3], "it may begin again"
    assert batch.step() and batch.step()
    assert torch.equal(batch.images([3])[0], alone[2])


def test_adapters_are_drawn_with(tiny_bundle: Path, pretrained_cache: Path) -> None:
    made: Any = load_generator(tiny_bundle, pretrained_cache=pretrained_cache, device="cpu")
    apply_policy(made.model, TrainConfig(policy="lora", lora_rank=2))
    before = made.generate([REQUEST])  # they begin without effect
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    made = type(made)(made.model, made.config, made.spec, made.parts)
    assert not torch.equal(before, made.generate([REQUEST]))


def test_tokens_are_counted(generator: Any) -> None:
    plain = generator.count_tokens(REQUEST)
    assert plain.text > 2 and (plain.canvas, plain.drawn) == (0, 64)
    edit = generator.count_tokens(replace(REQUEST, negative_prompt="dog", canvas=canvas()))
    assert edit.text > plain.text and edit.canvas == 64


@pytest.mark.parametrize(
    ("made", "param"),
    [
        (Canvas(b"123"), "image"),
        (Canvas(canvas().pixels, b"1"), "mask"),
        (canvas(torch.zeros_like(CORNER)), "mask"),
        (canvas(None, share=0.0), "share"),
    ],
)
def test_a_canvas_that_does_not_fit_is_refused(generator: Any, made: Canvas, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        generator.generate([replace(REQUEST, canvas=made)])
    assert caught.value.param == param
