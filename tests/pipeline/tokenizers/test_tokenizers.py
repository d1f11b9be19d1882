"""The contract of every image tokenizer, and FSQ against its paper's formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import registry
from pipeline.artifacts import resolve_path
from pipeline.config import TokenizerConfig, TrainConfig, load_recipe
from pipeline.contracts import ImageTokenizer
from pipeline.errors import RecipeError
from pipeline.images.pixels import to_float
from pipeline.objective import TokenizerNetwork
from pipeline.tokenizers import build_tokenizer, load_tokenizer_kind
from pipeline.tokenizers._saved import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_shape_of_source,
    tokenizer_source,
)
from pipeline.tokenizers.fsq import FSQ
from pipeline.tokenizers.vq import CosineVQ
from pipeline.training.policy import apply_policy
from pipeline.training.tokenizer import TokenizerObjective

CONFIG = TokenizerConfig(
    levels=(5, 4, 3),
    codebook_size=64,
    widths=(16, 32),
    encoder_depths=(1, 1),
    decoder_depths=(1, 1),
)
tokenizers = pytest.mark.parametrize("name", registry.names("tokenizers"))


def build(name: str, image_size: int = 32) -> TokenizerNetwork:
    torch.manual_seed(0)
    return build_tokenizer(CONFIG.model_copy(update={"name": name}), image_size).eval()


@tokenizers
def test_shapes_and_ranges(name: str) -> None:
    tokenizer = build(name)
    assert isinstance(tokenizer, ImageTokenizer)
    tokens = tokenizer.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert int(tokens.min()) >= 0 and int(tokens.max()) < tokenizer.codebook_size
    images = tokenizer.decode(tokens)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1


@tokenizers
def test_overfits_one_batch(name: str) -> None:
    torch.manual_seed(0)
    objective = TokenizerObjective(CONFIG.model_copy(update={"name": name}), 32)
    batch = {
        "images": (torch.rand(2, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3) * 255)
    }
    batch["images"] = batch["images"].to(torch.uint8)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(150):
        losses = objective.losses(batch, "reconstruct")
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["psnr"] > 25


@tokenizers
def test_the_adversarial_phase_trains_both_sides_and_validates_neither(name: str) -> None:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"name": name, "adversarial_weight": 0.1})
    objective = TokenizerObjective(config, 32)
    assert objective.phases == ("discriminate", "reconstruct")
    batch = {"images": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)}
    discriminator, tokenizer = (objective.trained_network(phase) for phase in objective.phases)
    assert tokenizer is objective.model
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=2e-3) for network in (discriminator, tokenizer)
    ]
    first = objective.losses(batch, "discriminate")["loss"].item()
    for _ in range(30):
        loss = objective.losses(batch, "discriminate")["loss"]
        loss.backward()
        assert all(p.grad is None for p in tokenizer.parameters()), "it only looks"
        optimizers[0].step()
        objective.zero_grad(set_to_none=True)
    assert loss.item() < 0.5 * first, "noise and its blur are easy to tell apart"
    before = objective.losses(batch, "reconstruct")
    for _ in range(60):  # the discriminator stays as it is: it must be fooled
        objective.losses(batch, "reconstruct")["adversarial"].backward()
        optimizers[1].step()
        objective.zero_grad(set_to_none=True)
    after = objective.losses(batch, "reconstruct")
    assert after["adversarial"] < before["adversarial"] - 0.5
    assert "adversarial" not in objective.validate(batch)


@tokenizers
def test_save_and_load(name: str, tmp_path: Path) -> None:
    tokenizer = build(name)
    config = CONFIG.model_copy(update={"name": name})
    save_tokenizer(tmp_path, tokenizer.state_dict(), config, 32)
    loaded = load_tokenizer(tmp_path)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tokenizer.state_dict()[key].half().float()), key


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 5, 5, 5), (2, 3), (8, 6, 4)])
def test_fsq_is_a_bijection_between_codes_and_indices(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    indices = torch.arange(fsq.codebook_size)
    codes = fsq.to_codes(indices)
    assert torch.equal(fsq.to_indices(codes), indices)
    assert len({tuple(code) for code in codes.tolist()}) == fsq.codebook_size == np.prod(levels)


@pytest.mark.parametrize("levels", [(8, 5), (7, 4), (3, 2)])
def test_fsq_matches_the_reference_formula(levels: tuple[int, ...]) -> None:
    """numpy, after the listing in appendix A of Mentzer et al. 2023."""
    latents = np.random.default_rng(0).normal(scale=3, size=(50, len(levels)))
    sizes = np.array(levels)
    half_l = (sizes - 1) * (1 + 1e-3) / 2
    offset = np.where(sizes % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(latents + np.arctanh(offset / half_l)) * half_l - offset
    expected = np.round(bounded) / (sizes // 2)
    found, loss = FSQ(levels)(torch.tensor(latents, dtype=torch.float32))
    assert loss == 0
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_fsq_passes_gradients_straight_through() -> None:
    latents = torch.zeros(1, 2, requires_grad=True)
    FSQ((5, 5))(latents)[0].sum().backward()
    assert latents.grad is not None and (latents.grad > 0).all()


def vq(**settings: float) -> CosineVQ:
    torch.manual_seed(0)
    return CosineVQ(CONFIG.model_copy(update={"codebook_size": 32, "code_width": 4, **settings}))


def test_vq_matches_the_reference_formula() -> None:
    """numpy, after sections 3.1 of the sources: nearest by cosine, squared distances both ways."""
    quantizer = vq(commitment_weight=0.5).eval()
    latents = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    table = quantizer.codebook.weight.detach().numpy()
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    nearest = ((unit[:, None] - table[None]) ** 2).sum(2).argmin(1)
    codes, loss = quantizer(torch.from_numpy(latents))
    np.testing.assert_allclose(codes.detach().numpy(), table[nearest], atol=1e-6)
    assert quantizer.to_indices(codes).tolist() == nearest.tolist()
    expected = 1.5 * ((unit - table[nearest]) ** 2).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_entropy_term_keeps_codes_in_use() -> None:
    used = {}
    for weight in (0.0, 0.5):
        quantizer, encoder = vq(entropy_weight=weight), torch.nn.Linear(4, 4)
        torch.nn.init.zeros_(encoder.weight)  # all latents fall on one code
        parameters = [*quantizer.parameters(), *encoder.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.03)
        inputs = torch.randn(256, 4)
        for _ in range(100):
            _, loss = quantizer(encoder(inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        quantizer.eval()
        used[weight] = quantizer.to_indices(quantizer(encoder(inputs))[0]).unique().numel()
    assert used[0.5] > 24 > 8 > used[0.0]


def test_a_given_tokenizer_of_another_size_is_refused() -> None:
    base, config = resolve_path("asset:base"), TokenizerConfig(source="asset:base", freeze=True)
    assert tokenizer_source(None, TokenizerConfig(), 128) is None, "from scratch"
    assert tokenizer_source(None, config, 64) == tokenizer_source(base, TokenizerConfig(), 64)
    going_on = TokenizerConfig(source="asset:base")
    assert tokenizer_source(None, going_on, 128) == tokenizer_source(None, config, 64)
    for start, section in ((base, TokenizerConfig()), (None, config)):
        with pytest.raises(RecipeError, match=r"image_size=128: the tokenizer at .* made for 64"):
            tokenizer_source(start, section, 128)


def test_a_tokenizers_shape_comes_from_its_source() -> None:
    source = resolve_path("asset:base") / "tokenizer"
    shaped = tokenizer_shape_of_source(TokenizerConfig(l1_weight=2), source)
    built = load_tokenizer(source).config
    assert shaped.l1_weight == 2
    shape = ("name", *load_tokenizer_kind("fsq").shape_fields)
    assert {"levels", "downsample", "patch", "widths", "encoder_depths"} < set(shape)
    assert all(getattr(shaped, key) == getattr(built, key) for key in shape)
    assert tokenizer_shape_of_source(TokenizerConfig(), None) == TokenizerConfig()
    with pytest.raises(RecipeError, match=r"tokenizer\.patch=2 is not that of the tokenizer in"):
        tokenizer_shape_of_source(TokenizerConfig(patch=2), source)


def test_a_patch_that_does_not_fill_a_token_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"downsample=8 must be a multiple of tokenizer\.patch=3"):
        build_tokenizer(CONFIG.model_copy(update={"patch": 3}), 32)


@tokenizers
def test_policy_head_trains_the_decoder_and_tokens_stay(name: str) -> None:
    config = CONFIG.model_copy(update={"name": name, "train": TrainConfig(policy="head")})
    torch.manual_seed(0)
    made = TokenizerObjective(config, 32)
    trainable, total = apply_policy(made.model, config.train)
    assert trainable == sum(p.numel() for p in made.model.decoder.parameters()) < total
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    shown = to_float(images)
    tokens, looks = made.model.encode(shown), made.model.decode(made.model.encode(shown))
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-2)
    made.losses({"images": images}, "reconstruct")["loss"].backward()
    optimizer.step()
    assert torch.equal(made.model.encode(shown), tokens)
    assert not torch.equal(made.model.decode(tokens), looks)


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("smoke", ["tokenizer.train.policy=lora"], "a tokenizer trains in full, or its decoder"),
        ("smoke", ["tokenizer.train.policy=head"], "the decoder of a tokenizer that there is"),
        ("emoji-gan", ["tokenizer.train.policy=head"], "freeze=true and tokenizer.train.policy"),
    ],
)
def test_a_policy_that_a_tokenizer_cannot_have_is_refused(
    recipe: str, overrides: list[str], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(recipe, overrides, environment={})
