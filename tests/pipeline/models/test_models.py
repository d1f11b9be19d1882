"""The contract every generator family keeps; a new file in pipeline/models inherits it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import registry
from pipeline.bundles.bundle import load_bundle, load_generator
from pipeline.config import GeneratorConfig, TrainConfig
from pipeline.contracts import (
    GenerationRequest,
    ImageGenerator,
    ModelSpec,
    PromptCountingGenerator,
    StepChoosingGenerator,
    SteppedGenerator,
)
from pipeline.errors import BundleError, RecipeError, RequestError
from pipeline.models import load_family
from pipeline.models.gan import GanConfig
from pipeline.models.networks import masked
from pipeline.objective import Objective, TrainableNetwork
from pipeline.training.policy import adapter_weights, apply_policy, merged_weights

SPEC = ModelSpec(
    image_size=32, codebook_size=60, num_tokens=16, levels=(5, 4, 3), caption_width=24,
    styles=("a", "b"),
)  # fmt: skip
CONFIG = GeneratorConfig(
    width=64, depth=2, heads=4, caption_depth=1, dropout=0, caption_dropout=0, style_dropout=0,
    label_smoothing=0, num_steps=4, num_styles=4, gan=GanConfig(channels=8),
)  # fmt: skip
REQUEST = GenerationRequest("红苹果", seed=7, style="noto")

FAMILIES = registry.names("models")
families = pytest.mark.parametrize("family", FAMILIES)
TOKEN_FAMILIES = [f for f in FAMILIES if load_family(f).reads == "image_tokens"]
token_families = pytest.mark.parametrize("family", TOKEN_FAMILIES)


def toy_batch(size: int = 4) -> dict[str, torch.Tensor]:
    """Random tokens, pictures of one colour and captions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(size) % 5 + 2
    colours = torch.randint(256, (size, 3, 1, 1), generator=generator, dtype=torch.uint8)
    return {
        "images": colours.expand(-1, -1, 32, 32),
        "image_tokens": torch.randint(SPEC.codebook_size, (size, 16), generator=generator),
        "caption_states": torch.randn(size, 6, 24, generator=generator).half(),
        "caption_ids": torch.randint(256, (size, 6), generator=generator),
        "caption_mask": torch.arange(6) < lengths[:, None],
        "style": torch.arange(size) % 2,
        "group": torch.arange(size),
    }


def objective(family: str, config: GeneratorConfig = CONFIG) -> Objective:
    torch.manual_seed(0)
    made, spec = load_family(family), SPEC
    spec = replace(spec, language_model=made.language_model_config(config, None))
    return made.objective(made.build(config, spec), config)


@families
def test_losses_are_finite_scalars_in_every_phase(family: str) -> None:
    made = objective(family)
    for phase in made.phases:
        losses = made.losses(toy_batch(), phase)
        assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
        losses["loss"].backward()


@token_families
def test_overfits_one_batch(family: str) -> None:
    made, batch = objective(family), toy_batch()
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3, weight_decay=0)
    first = last = float("nan")
    for step in range(250):
        torch.manual_seed(step)
        loss = made.losses(batch, made.phases[-1])["loss"]
        last = loss.item()
        first = last if step == 0 else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 3 and last < 0.3, (first, last)


@families
def test_captions_and_styles_change_the_loss(family: str) -> None:
    made, batch = objective(family), toy_batch()
    for parameter in made.parameters():  # away from the zeros of initialisation
        nn.init.normal_(parameter, std=0.1)
    made.eval()

    def loss(**changes: torch.Tensor) -> float:
        torch.manual_seed(3)
        return made.losses(batch | changes, made.phases[-1])["loss"].item()

    assert loss() == loss()
    reads_ids = load_family(family).caption_tokenizer(CONFIG, None) is not None
    read = "caption_ids" if reads_ids else "caption_states"
    assert loss() != loss(**{read: batch[read].flip(0)})
    assert loss() != loss(style=1 - batch["style"])


@families
@pytest.mark.parametrize("policy", ["full", "head", "lora", "frozen"])
def test_only_what_the_policy_chooses_moves(family: str, policy: str) -> None:
    made = objective(family)
    trainable, total = apply_policy(made.model, TrainConfig(policy=policy, lora_rank=2))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        torch.manual_seed(step)
        made.losses(toy_batch(), made.phases[-1])["loss"].backward()
        optimizer.step()
    for name, parameter in made.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(before[name], parameter), name
    assert 0 < trainable <= total and (trainable == total) == (policy == "full")


def test_an_unknown_policy_or_family_lists_what_exists() -> None:
    with pytest.raises(RecipeError, match=r"maskd.*masked"):
        registry.load("models", "maskd")
    with pytest.raises(RecipeError, match="full"):
        apply_policy(TrainableNetwork(), TrainConfig(policy="head"))


@families
def test_merged_adapters_do_what_adapters_did(family: str) -> None:
    config = TrainConfig(policy="lora", lora_rank=2)
    trained, plain = objective(family), objective(family)
    apply_policy(trained.model, config)
    for parameter in trained.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    weights = trained.model.state_dict()
    assert adapter_weights(weights) and not adapter_weights(plain.model.state_dict())
    merged = merged_weights(objective(family).model, config, weights)
    assert merged.keys() == plain.model.state_dict().keys()

    def loss(made: nn.Module) -> float:
        made.eval()
        torch.manual_seed(3)
        return made.losses(toy_batch(), made.phases[-1])["loss"].item()  # type: ignore[no-any-return]

    before = loss(plain)
    plain.model.load_state_dict(merged)
    assert loss(plain) == pytest.approx(loss(trained), rel=1e-4) != pytest.approx(before, rel=1e-2)


class TestBundle:
    """On a bundle as it lies on disk, with the real caption encoder."""

    @pytest.fixture(scope="class", params=FAMILIES)
    def generator(
        self,
        request: pytest.FixtureRequest,
        tiny_bundles: dict[str, Path],
        pretrained_cache: Path,
    ) -> ImageGenerator:
        """Its random weights enlarged, so that captions, styles and noise all matter."""
        bundle = tiny_bundles[request.param]
        loaded = load_generator(bundle, pretrained_cache=pretrained_cache, device="cpu")
        torch.manual_seed(1)
        for parameter in loaded.model.parameters():  # type: ignore[attr-defined]
            nn.init.normal_(parameter, std=0.3)
        return loaded

    def test_keeps_the_seam(self, generator: ImageGenerator) -> None:
        assert isinstance(generator, ImageGenerator)
        images = generator.generate([REQUEST, replace(REQUEST, seed=8)])
        assert images.dtype == torch.uint8 and images.shape == (2, 3, 64, 64)

    def test_tells_how_much_of_a_prompt_it_reads(self, generator: ImageGenerator) -> None:
        assert isinstance(generator, PromptCountingGenerator)
        short, long = (generator.count_prompt("a red apple " * times) for times in (1, 100))
        assert short.used == short.given < long.used < long.given
        if isinstance(generator, SteppedGenerator):
            empty = generator.count_tokens(GenerationRequest("")).text
            read = generator.count_tokens(GenerationRequest("a red apple " * 100)).text
            assert read - empty == long.used

    def test_says_whether_requests_choose_the_number_of_steps(
        self, generator: ImageGenerator
    ) -> None:
        choice = replace(REQUEST, num_steps=3)
        if isinstance(generator, StepChoosingGenerator):
            own = replace(REQUEST, num_steps=generator.num_steps)
            assert torch.equal(generator.generate([own]), generator.generate([REQUEST]))
            generator.generate([choice])
        else:
            with pytest.raises(RequestError, match="num_steps"):
                generator.generate([choice])

    def test_same_request_same_picture_whatever_the_batch(self, generator: ImageGenerator) -> None:
        alone = generator.generate([REQUEST])[0]
        steps = 9 if generator.config.family == "masked" else None  # type: ignore[attr-defined]
        others = [
            GenerationRequest("dog", seed=1, guidance_scale=1.0, num_steps=steps, temperature=0.5),
            GenerationRequest("a much longer caption about a red house by the sea", seed=2),
        ]
        assert torch.equal(alone, generator.generate([REQUEST])[0])
        assert torch.equal(alone, generator.generate([*others, REQUEST])[2])

    @pytest.mark.parametrize(
        "change",
        [{"seed": 8}, {"prompt": "蓝色的狗"}, {"guidance_scale": 9.0}, {"style": "twemoji"}],
    )
    def test_what_is_asked_matters(
        self, generator: ImageGenerator, change: dict[str, object]
    ) -> None:
        asked = generator.generate([REQUEST, replace(REQUEST, **change)])
        assert not torch.equal(asked[0], asked[1])

    def test_a_negative_prompt_matters_when_guided(self, generator: ImageGenerator) -> None:
        for scale, matters in ((4.0, True), (1.0, False)):
            asked = replace(REQUEST, guidance_scale=scale)
            plain, led = generator.generate([asked, replace(asked, negative_prompt="a blue dog")])
            assert torch.equal(plain, led) != matters

    def test_steps_are_reported(self, generator: ImageGenerator) -> None:
        seen: list[tuple[int, int]] = []
        generator.generate([REQUEST], on_step=lambda done, total: seen.append((done, total)))
        total = len(seen)
        assert seen == [(i + 1, total) for i in range(total)] and total in (1, 4, 64)

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"prompt": "  "}, "prompt"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**63}, "seed"),
            ({"guidance_scale": float("nan")}, "guidance_scale"),
            ({"guidance_scale": 0.5}, "guidance_scale"),
            ({"temperature": -1.0}, "temperature"),
            ({"num_steps": 0}, "num_steps"),
            ({"style": "rembrandt"}, "style"),
        ],
    )
    def test_requests_outside_the_limits_are_refused_by_name(
        self, generator: ImageGenerator, change: dict[str, object], param: str
    ) -> None:
        with pytest.raises(RequestError) as caught:
            generator.generate([REQUEST, replace(REQUEST, **change)])
        assert caught.value.param == param

    def test_saved_weights_come_back_bit_for_bit(self, tiny_bundle: Path) -> None:
        first, second = load_bundle(tiny_bundle), load_bundle(tiny_bundle)
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name])
            assert torch.equal(tensor, tensor.half().float()), "stored as float16"
        assert first.digest == second.digest

    def test_whoever_may_read_a_bundle_s_config_may_read_its_weights(
        self, tiny_bundle: Path
    ) -> None:
        modes = {path.stat().st_mode for path in tiny_bundle.rglob("*") if path.is_file()}
        assert len(modes) == 1

    @pytest.mark.parametrize("damage", ["flip", "missing", "manifest", "format"])
    def test_a_damaged_bundle_is_refused(
        self, tiny_bundle: Path, tmp_path: Path, damage: str
    ) -> None:
        copy = tmp_path / "copy"
        (copy / "tokenizer").mkdir(parents=True)
        for file in tiny_bundle.rglob("*"):
            if file.is_file():
                (copy / file.relative_to(tiny_bundle)).write_bytes(file.read_bytes())
        weights, manifest = copy / "model.safetensors", copy / "config.json"
        if damage == "flip":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        elif damage == "missing":
            weights.unlink()
        elif damage == "manifest":
            manifest.write_text("{")
        else:
            manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
        with pytest.raises(BundleError, match="copy"):
            load_bundle(copy)


def test_logits_come_in_few_shapes() -> None:
    """Filled up to whole ROWS, with rows that neither the loss nor the accuracy counts."""
    tokens = torch.arange(32 * 64).view(32, 64)
    hidden = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    rows, target = masked._rows_to_guess(tokens, hidden)
    count = int(hidden.sum())
    assert len(rows) == len(target) == 2 * masked.ROWS > count
    assert torch.equal(target[:count], tokens[hidden])
    assert torch.equal(rows[:count], tokens[hidden])
    assert (target[count:] == masked.NO_TARGET).all()
