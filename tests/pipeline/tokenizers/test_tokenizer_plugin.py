"""A tokenizer is one file: one from a plugin directory trains, is saved and comes back.

tests/jobs/test_plugins.py trains a generator on its tokens and serves it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import registry
from pipeline.chain.idle import idle_settings
from pipeline.config import TokenizerConfig, TrainConfig, load_recipe
from pipeline.contracts import ImageTokenizer
from pipeline.errors import BundleError, RecipeError
from pipeline.images.pixels import to_float
from pipeline.objective import TokenizerNetwork
from pipeline.tokenizers import build_tokenizer
from pipeline.tokenizers._saved import load_tokenizer, save_tokenizer, tokenizer_shape_of_source
from pipeline.training.policy import apply_policy
from pipeline.training.tokenizer import TokenizerObjective

PLUGINS = Path(__file__).parents[2] / "plugins"
BITS_4 = {"name": "mean_colour", "mean_colour": {"bits": 4}}


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.PLUGINS, str(PLUGINS))


@pytest.fixture
def config(plugins: None) -> TokenizerConfig:
    return TokenizerConfig.model_validate(BITS_4)


def test_it_is_listed_and_has_the_whole_interface(
    config: TokenizerConfig, icon_images: Tensor
) -> None:
    assert registry.names("tokenizers") == ["fsq", "mean_colour", "vq"]
    tokenizer = build_tokenizer(config, 64)
    assert isinstance(tokenizer, TokenizerNetwork) and isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.codebook_size, tokenizer.grid_size) == (16**3, 8)
    tokens = tokenizer.encode(to_float(icon_images[:4]))
    assert tokens.shape == (4, 64) and int(tokens.max()) < tokenizer.codebook_size
    assert tokenizer.decode(tokens).shape == (4, 3, 64, 64)


def test_it_trains_in_full_and_by_its_head_and_comes_back_from_disk(
    config: TokenizerConfig, icon_images: Tensor, tmp_path: Path
) -> None:
    config = config.model_copy(update={"train": TrainConfig(policy="head")})
    objective = TokenizerObjective(config, 64)
    assert apply_policy(objective.model, config.train)[0] > 0
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    batch = {"images": icon_images[:16]}
    first = objective.losses(batch, "reconstruct")["loss"].item()
    for _ in range(20):
        optimizer.zero_grad()
        losses = objective.losses(batch, "reconstruct")
        losses["loss"].backward()
        optimizer.step()
    assert losses["loss"].item() < 0.5 * first
    save_tokenizer(tmp_path, objective.model.state_dict(), config, 64)
    loaded, shown = load_tokenizer(tmp_path), to_float(icon_images[:4])
    assert torch.equal(loaded.encode(shown), objective.model.encode(shown))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tokenizer.mean_colour.bitz=4", "'tokenizer.mean_colour.bitz'; did you mean 'bits'?"),
        ("tokenizer.mean_colour.bits=9", "tokenizer.mean_colour.bits=9: Input should be less"),
        ("tokenizer.fsq.bits=4", "unknown key 'tokenizer.fsq.bits'"),
        ("tokenizer.mean_color.bits=4", "did you mean 'mean_colour'?"),
        ("tokenizer.name=mean_color", "Did you mean 'mean_colour'?"),
    ],
)
def test_its_own_settings_are_checked_with_the_recipe(setting: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe("smoke", [setting], environment={})


def test_its_own_settings_are_part_of_its_shape(config: TokenizerConfig, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, build_tokenizer(config, 64).state_dict(), config, 64)
    taken = tokenizer_shape_of_source(TokenizerConfig(), tmp_path)
    assert build_tokenizer(taken, 64).codebook_size == 16**3
    other = TokenizerConfig.model_validate({"name": "mean_colour", "mean_colour": {"bits": 3}})
    with pytest.raises(RecipeError, match=r"mean_colour\.bits=3 is not that of the tokenizer in"):
        tokenizer_shape_of_source(other, tmp_path)


def test_without_the_plugin_what_it_made_is_refused(
    config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path, build_tokenizer(config, 64).state_dict(), config, 64)
    monkeypatch.delenv(registry.PLUGINS)
    with pytest.raises(BundleError, match="no tokenizer is called 'mean_colour'"):
        load_tokenizer(tmp_path)


def test_settings_of_other_tokenizers_are_named_as_without_effect() -> None:
    settings = ["tokenizer.codebook_size=64", "tokenizer.mean_colour.bits=2"]
    idle = [str(i) for i in idle_settings(load_recipe("smoke", settings, environment={}))]
    assert "tokenizer: mean_colour is without effect on the tokenizer fsq" in idle
    assert any(said.startswith("tokenizer: codebook_size is without effect") for said in idle)
