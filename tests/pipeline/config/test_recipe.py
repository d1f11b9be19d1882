"""Recipes: what is accepted, and how each mistake is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import (
    AugmentConfig,
    Recipe,
    ServeConfig,
    load_recipe,
    load_serve_section,
    recipe_names,
)
from pipeline.errors import RecipeError


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load(name: str) -> None:
    recipe = load_recipe(name, environment={})
    assert recipe.name == name and recipe.description


def test_command_line_wins_over_environment_wins_over_file() -> None:
    environment = {
        "TESSERA__GENERATOR__TRAIN__MAX_STEPS": "7",
        "TESSERA__GENERATOR__TRAIN__LEARNING_RATE": "1e-4",
    }
    recipe = load_recipe("smoke", ["generator.train.max_steps=9"], environment)
    assert recipe.generator.train.max_steps == 9
    assert recipe.generator.train.learning_rate == 1e-4
    assert recipe.generator.train.batch_size == 32


def test_without_a_recipe_the_service_is_what_the_environment_says() -> None:
    environment = {"TESSERA__SERVE__MAX_BATCH_SIZE": "32", "TESSERA__GENERATOR__DEPTH": "9"}
    assert load_serve_section(environment) == ServeConfig(max_batch_size=32)
    assert load_serve_section({}) == ServeConfig()
    with pytest.raises(RecipeError, match=r"'serve\.num_gpu'; did you mean 'num_gpus'"):
        load_serve_section({"TESSERA__SERVE__NUM_GPU": "1"})
    with pytest.raises(RecipeError, match=r"unknown key 'serv' .*serve, tracking"):
        load_serve_section({"TESSERA__SERV__NUM_GPUS": "1"})
    with pytest.raises(RecipeError, match=r"serve\.min_replicas='two'"):
        load_serve_section({"TESSERA__SERVE__MIN_REPLICAS": "two"})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "tokenizer.widths=[64,90]",
            r"tokenizer.widths.*the second must be a multiple of 4",
        ),
        (
            "tokenizer.levels=[8,8,8,8,8,8]",
            r"tokenizer.levels.*at most 65,536; this product is 262,144",
        ),
        ("generator.train.accumulate=3", r"batch_size=\d+ must be a multiple of .*accumulate=3"),
        ("generator.widht=3", r"unknown key 'generator.widht'; did you mean 'width'"),
        ("generator.train.qqq=3", r"unknown key 'generator.train.qqq'; known here: .*batch_size"),
        ("generator.train.max_steps=many", r"generator.train.max_steps='many'.*integer"),
        ("generator.train.max_steps=0", r"max_steps=0.*greater than or equal to 1"),
        ("generator.train.optimizer=adam", r"optimizer='adam'.*'adamw'"),
        ("generator.train.batch_size=7", r"batch_size=7 must be a multiple of .*num_workers=2"),
        ("generator.base_share=0.2", r"base_share=0.2 is of a base's weights.*with `base`"),
        ("generator.num_steps=100", r"num_steps=100: .*less than or equal to 64"),
        ("generator.guidance_scale=50", r"guidance_scale=50: .*less than or equal to 20"),
        ("evaluate.guidance_scales=[0.5]", r"guidance_scales.0=0.5: .*greater than or equal to 1"),
        ("data.test_fraction=0", r"test_fraction=0: .*greater than 0"),
        ("promote.model_name=a/b", r"model_name='a/b'"),
        ("tokenizer.train.batch_size=33", r"tokenizer.train.batch_size=33 must be a multiple"),
        ("encode.num_views=1", r"encode.num_views=1: raise it"),
        ("preprocess.image_size=60", r"image_size=60 must be a multiple of tokenizer.downsample=8"),
        ("max_steps", r"not of the form section.key=value"),
        ("learning_rate=1", r"setting of .*generator.train.*: write 'generator.train.learning_rat"),
        ("generator.bootstrap=9", r"'generator.bootstrap'; did you mean 'evaluate.bootstrap'"),
        ("generator.masked.x=1", r"unknown key 'generator.masked.x'; this section has no settings"),
        ("data.shards=[]", r"data.shards=\[\]: .*at least 1 item"),
        ("data.shards=[a,b,a]", r"data.shards.*: a is named twice"),
        ("generator.tasks=[completion,completion]", "a task is there twice"),
        ("generator.temperature=.nan", r"temperature=nan: .*finite number"),
        ("generator.train.learning_rate=.inf", r"learning_rate=inf: .*finite number"),
        ("tokenizer.train.betas=[.nan, 0.9]", r"betas.0=nan: "),
        ("tokenizer.train.betas=[0.9, 1]", r"betas.1=1: .*less than 1"),
        ("generator.depth=1000000", r"depth=1000000: .*less than or equal to 512"),
        ("generator.caption_depth=9999", r"caption_depth=9999: .*less than or equal to 512"),
        ("tokenizer.decoder_depths=[1,9999]", r"decoder_depths.1=9999: .*equal to 512"),
        ("tokenizer.widths=[0,64]", r"tokenizer.widths.0=0: .*greater than or equal to 1"),
        ("generator.width=[", r"not a YAML value"),
        ("name.first=x", r"'name' is a value, not a section"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("emoji-base", [override], {})


def test_unknown_recipes_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there are: .*smoke.*Did you mean 'smoke'"):
        load_recipe("smok")
    with pytest.raises(RecipeError, match="no recipe file at"):
        load_recipe(tmp_path / "none.yaml")
    for text, said in (("a: [", "not YAML"), ("- a", "must hold a mapping"), ("nam: x", "'name'")):
        broken = tmp_path / "broken.yaml"
        broken.write_text(text)
        with pytest.raises(RecipeError, match=said):
            load_recipe(broken)


def test_every_setting_beyond_the_obvious_is_described() -> None:
    """Units and limits are where a user looks for them."""
    obvious = {"seed", "schedule", "betas", "width", "heads", "dropout", "policy"}
    for section in Recipe.model_fields.values():
        fields = getattr(section.annotation, "model_fields", {})
        for name, field in fields.items():
            nested = hasattr(field.annotation, "model_fields")
            assert field.description or nested or name in obvious or "weight" in name, name


def test_a_section_given_in_part_keeps_the_defaults_of_its_place() -> None:
    settings = ["aligner.train.max_steps=3000", "encode.num_views=4", "encode.augment.color=0.2"]
    recipe = load_recipe("emoji-demo", settings, environment={})
    default = Recipe.model_validate({"name": "x"})
    changed = {"max_steps": 3000}
    assert recipe.aligner.train == default.aligner.train.model_copy(update=changed)
    assert recipe.aligner.train.batch_size == 256 and recipe.aligner.train.augment.shift == 6
    assert recipe.encode.augment == AugmentConfig(shift=2, flip=0.0, color=0.2)


def test_what_is_said_at_its_default_is_still_said_to_candidates_and_trials() -> None:
    said = ["generator.tasks=[text_to_image]", "generator.gan.patch=2", "generator.dropout=0.2"]
    recipe = load_recipe("emoji-demo", said, environment={})
    trial = recipe.with_settings({"generator.train.seed": 5})
    listed = recipe.model_copy(update={"candidates": {"a": {}, "b": {"depth": 3}}})
    for generator in (recipe.generator, trial.generator, *listed.generators.values()):
        assert {"tasks", "dropout"} <= generator.model_fields_set
        assert generator.gan.model_fields_set == {"patch"}


def test_candidates_are_the_generator_section_with_changes() -> None:
    recipe = load_recipe("emoji-families", environment={})
    assert [c.family for c in recipe.generators.values()] == ["masked", "causal", "gan"]
    gan = recipe.generators["gan"]
    assert gan.train.optimizer == "adamw" and gan.train.batch_size == 64, "changed and shared"
    smoke = load_recipe("smoke", environment={})
    assert smoke.generators == {"candidate": smoke.generator}
    changed = load_recipe("emoji-families", ["candidates.gan.train.max_steps=3"], environment={})
    assert [c.train.max_steps for c in changed.generators.values()] == [20_000, 20_000, 3]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("candidates={a: {}}", "list at least two"),
        ("candidates={a: {}, champion: {}}", "'champion' is no name for one"),
        ("candidates={a: {}, B b: {}}", "'B b' is no name for one"),
        ("candidates={a: {}, b: {widht: 3}}", r"'candidates.b.widht'; did you mean 'width'"),
        ("candidates={a: {}, b: {depth: 0}}", r"candidates.b.depth=0: .*greater than or equal"),
        ("candidates={a: {depth: 3}, b: {depth: 3}}", "a and b are the same generator"),
        ("candidates={a: {}, b: {dropout: 0.1}}", "a and b are the same generator"),
        ("candidates={a: {}, b: {family: maskd}}", r"maskd.*masked"),
        ("candidates={a: {}, b: {train: {batch_size: 7}}}", r"candidates.b.train.batch_size=7"),
    ],
)
def test_a_bad_candidate_says_what_is_wrong(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("smoke", [override], environment={})


def test_a_search_among_candidates_is_refused() -> None:
    space = "tune={space: {generator.depth: {choice: [1]}}, grace_steps: 5}"
    with pytest.raises(RecipeError, match="remove `candidates` or `tune`"):
        load_recipe("smoke", ["candidates={a: {}, b: {}}", space], environment={})
