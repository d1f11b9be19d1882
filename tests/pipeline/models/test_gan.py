"""The GAN family: losses against their formulas, and colours learned from captions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file
from torch import Tensor

from pipeline.bundles.bundle import load_generator
from pipeline.config import GeneratorConfig, TrainConfig
from pipeline.contracts import GenerationRequest, ModelParts, ModelSpec
from pipeline.errors import RecipeError, RequestError
from pipeline.images.pixels import to_float
from pipeline.models.gan import GanConfig
from pipeline.models.networks import gan
from pipeline.training.loop import Training, fit

SPEC = ModelSpec(
    image_size=16, codebook_size=8, num_tokens=4, levels=(8,), caption_width=12, styles=("a",)
)
CONFIG = GeneratorConfig(
    family="gan", width=32, caption_dropout=0, style_dropout=0, num_styles=2,
    gan=GanConfig(channels=16, noise_width=8, augment=False, reconstruction_weight=0),
)  # fmt: skip
COLOURS = torch.tensor([[230, 20, 20], [20, 200, 30], [20, 30, 220], [240, 230, 20]])


def colour_batch() -> dict[str, torch.Tensor]:
    """Four pictures of one colour each, every one with a caption and a group of its own."""
    generator = torch.Generator().manual_seed(0)
    images = COLOURS.to(torch.uint8)[:, :, None, None].expand(-1, -1, 16, 16)
    return {
        "images": images.repeat(4, 1, 1, 1),
        "caption_states": torch.randn(4, 3, 12, generator=generator).repeat(4, 1, 1),
        "caption_mask": torch.ones(16, 3, dtype=torch.bool),
        "style": torch.zeros(16, dtype=torch.long),
        "group": torch.arange(4).repeat(4),
    }


def objective(config: GeneratorConfig = CONFIG) -> gan.GanObjective:
    torch.manual_seed(0)
    return gan.GanObjective(gan.OnePassGenerator(config, SPEC), config)


def test_captions_become_their_colours() -> None:
    made, batch = objective(), colour_batch()
    optimizers = {
        phase: torch.optim.Adam(made.trained_network(phase).parameters(), lr=lr, betas=(0.0, 0.9))
        for phase, lr in (("discriminator", 2e-3), ("generator", 1e-3))
    }
    for step in range(150):
        torch.manual_seed(step)
        for phase in made.phases:
            made.zero_grad()
            made.losses(batch, phase)["loss"].backward()
            optimizers[phase].step()
    made.eval()
    with torch.no_grad():
        drawn = made._draw(batch).mean((2, 3))[:4]
    wanted = COLOURS / 127.5 - 1
    nearest = torch.cdist(drawn, wanted).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3], drawn
    assert made.validate(batch)["loss"] < 0.1


def test_the_penalty_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """For D(x, c) = a . x + b . c the gradient's norm is |(a, b)|, whatever x and c are."""
    made = objective()
    a, b = torch.randn(3, 16, 16) / 50, torch.randn(32) / 5
    monkeypatch.setattr(
        made.discriminator, "forward", lambda x, c: (x * a).sum((1, 2, 3)) + (c * b).sum(1)
    )
    expected = 2.0 * (a.square().sum() + b.square().sum()).sqrt() ** 6
    found = made._penalty(torch.rand(5, 3, 16, 16), torch.randn(5, 32, requires_grad=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_penalty_sees_its_share_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = objective(), []
    penalty = made._penalty
    monkeypatch.setattr(
        made, "_penalty", lambda x, c: (seen.append((len(x), len(c))), penalty(x, c))[1]
    )
    made.losses(colour_batch(), "discriminator")
    assert seen == [(2, 2)], "an eighth of 16"


def test_the_contrastive_loss_is_both_cross_entropies_over_other_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows 0 and 1 are of one group, row 3 has no caption: neither is anyone's wrong answer."""
    made, fits = objective(), torch.randn(4, 4)
    monkeypatch.setattr(made.discriminator, "compare", lambda looks, condition: fits)
    batch = {
        "group": torch.tensor([7, 7, 8, 9]),
        "caption_mask": torch.tensor([[True], [True], [True], [False]]),
    }
    found = made._contrastive(torch.empty(0), torch.empty(0), batch)
    pairs = [(0, [0, 2]), (1, [1, 2]), (2, [0, 1, 2])]
    ways = [[x[own, own] - x[own, among].logsumexp(0) for own, among in pairs]
            for x in (fits, fits.T)]  # fmt: skip
    torch.testing.assert_close(found, -torch.tensor(ways).mean())


def test_the_reconstruction_is_of_pictures_with_a_caption() -> None:
    made = objective(CONFIG.model_copy(update={"gan": GanConfig(channels=16, noise_width=8)}))
    batch = colour_batch()
    batch["caption_mask"][1:] = False
    fake = to_float(batch["images"])
    fake[1:] += 1
    assert made._reconstruction(fake, batch) == 0
    fake[0, :, :, 8:] += 0.5  # L1 of 1/4; 1/15 of the horizontal differences are wrong by 1/2
    expected = 5 * (0.25 + 0.5 / 15)
    torch.testing.assert_close(made._reconstruction(fake, batch), torch.tensor(expected))


def test_mismatched_captions_are_of_other_groups() -> None:
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    wrong = group[gan._of_other_groups(group)]
    assert not (wrong == group).any()


def test_kid_is_unbiased_and_sees_a_difference() -> None:
    torch.manual_seed(0)
    same = torch.stack([gan._kid(torch.randn(64, 8), torch.randn(64, 8)) for _ in range(200)])
    assert abs(same.mean()) < 3 * same.std() / 200**0.5
    assert gan._kid(torch.randn(64, 8), torch.randn(64, 8) + 0.7) > same.max()


def test_a_picture_is_looked_at_once_for_both_its_captions() -> None:
    made, batch = objective(), colour_batch()
    condition = made._condition(batch, made.discriminator)
    looks = made.discriminator.features(to_float(batch["images"]))
    torch.testing.assert_close(
        made.discriminator.match(looks, condition),
        made.discriminator(to_float(batch["images"]), condition),
    )


def test_pictures_drawn_together_are_those_drawn_alone() -> None:
    model, batch = objective().model, colour_batch()
    parts = ModelParts(None, None, torch.device("cpu"))  # type: ignore[arg-type]
    generator = gan.GanGenerator(model, CONFIG, SPEC, parts)
    columns = (
        torch.randn(4, model.noise_width), batch["caption_states"][:4], batch["caption_mask"][:4],
        batch["caption_states"][4:8].flip(0), batch["caption_mask"][4:8], batch["style"][:4],
        torch.tensor([1.0, 1.0, 2.0, 3.0]),
    )  # fmt: skip
    with torch.inference_mode():
        together = generator._decode(*columns)
        singles = zip(*(column.split(1) for column in columns), strict=True)
        alone = torch.cat([generator._decode(*each) for each in singles])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_a_batch_of_one_group_has_no_mismatched_pair() -> None:
    made, batch = objective(), colour_batch()
    assert made.losses(batch, "discriminator")["mismatched"] > 0
    alike = batch | {"group": torch.zeros_like(batch["group"])}
    assert made.losses(alike, "discriminator")["mismatched"] == 0


def test_each_phase_moves_its_own_network() -> None:
    made, batch = objective(), colour_batch()
    assert made.trained_network("generator") is made.model
    assert made.trained_network("discriminator") is made.discriminator
    made.losses(batch, "discriminator")["loss"].backward()
    assert all(p.grad is None for p in made.model.parameters())
    assert all(p.grad is not None for p in made.discriminator.parameters())
    made.zero_grad(set_to_none=True)
    made.losses(batch, "generator")["loss"].backward()
    assert all(p.grad is not None for p in made.model.parameters())
    assert all(p.grad is None for p in made.discriminator.parameters()), "thrown away at once"
    assert all(p.requires_grad for p in made.discriminator.parameters())


def test_a_size_that_does_not_double_is_refused() -> None:
    with pytest.raises(RecipeError, match="image_size=48"):
        gan.OnePassGenerator(CONFIG, ModelSpec(48, 8, 4, (8,), 12, ("a",)))


def test_more_than_one_step_is_refused(
    tiny_bundles: dict[str, Path], pretrained_cache: Path
) -> None:
    generator = load_generator(tiny_bundles["gan"], pretrained_cache=pretrained_cache)
    with pytest.raises(RequestError, match="num_steps=4: this model always draws in 1"):
        generator.generate([GenerationRequest("x", num_steps=4)])


class ColourRows:
    """`colour_batch` as a data set."""

    weights = None

    def __len__(self) -> int:
        return 16

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in colour_batch().items()}


def build_training() -> Training:
    return Training(objective(), ColourRows(), ColourRows())


@pytest.mark.slow
def test_the_loop_moves_both_networks_on_two_workers(ray_session: None, tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see tests/
    config = TrainConfig(
        optimizer="adamw", batch_size=8, max_steps=4, validate_every=4, num_workers=2, accumulate=2,
        validation_batches=1,
    )  # fmt: skip
    result = fit(build_training, config, storage=tmp_path, name="gan")
    start = objective()
    drawn, judged = (
        load_file(result.checkpoint / f"{name}.safetensors") for name in ("model", "helpers")
    )
    first = start.discriminator.first.weight
    assert not torch.equal(judged["0.first.weight"], first)
    assert not torch.equal(drawn["first.weight"], start.model.first.weight)
    assert np.isfinite(result.metrics["validation_loss"])
