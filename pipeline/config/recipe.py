"""Recipes: every setting with its default, unit and limits, and how a recipe is read.

The larger sections are in files of their own beside this one.

A recipe is a YAML file (pipeline/recipes/NAME.yaml or a path). Any key can be overridden on the
command line (`generator.train.learning_rate=3e-4`) or by environment
(`TESSERA__GENERATOR__TRAIN__LEARNING_RATE=3e-4`; the command line wins). Unknown keys are refused.

    recipe = load_recipe("emoji-demo", overrides=["generator.train.max_steps=100"])
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline import registry
from pipeline.config.data import (
    AugmentConfig,
    DataConfig,
    ImageFilter,
    PreprocessConfig,
    check_unmixed,
)
from pipeline.config.judges import (
    AlignerConfig,
    FeaturesName,
    ImageNetJudgeConfig,
    JudgeName,
    check_judges,
)
from pipeline.config.overrides import explain, override, set_key, stated
from pipeline.config.promote import PromoteConfig
from pipeline.config.section import MAX_DEPTH, MAX_WIDTH, ChoiceConfig, Config, merged
from pipeline.config.serve import ServeConfig
from pipeline.config.tokenizer import TokenizerConfig
from pipeline.config.train import TrainConfig
from pipeline.config.tune import TuneConfig
from pipeline.errors import RecipeError

RECIPES = Path(__file__).parents[1] / "recipes"
ENVIRONMENT_PREFIX = "TESSERA__"
SUBJECTS = frozenset({"candidate", "champion", "untuned", "tokenizer", "real"})
"""Names of evaluation's reports, which no candidate of a recipe may have."""


class CaptionEncoderConfig(Config):
    """The frozen pretrained language model that reads captions."""

    model: str = Field("intfloat/multilingual-e5-small", description="hub id or directory")
    max_tokens: int = Field(24, ge=4, le=512, description="tokens after which captions are cut")
    prefix: str = Field(
        "query: ", description="put before every caption, as the model was trained with"
    )


MAX_GUIDANCE, MAX_TEMPERATURE, MAX_STEPS = 20.0, 4.0, 64
"""The largest values that a request may ask for, and that a model may have as its default."""


class EncodeConfig(Config):
    """Encoding images as image tokens, once, before generators are trained."""

    num_views: int = Field(
        1, ge=1, description="token grids per image; the first is of the image as it is"
    )
    augment: AugmentConfig = AugmentConfig(shift=2, flip=0.0)
    batch_size: int = Field(64, ge=1, description="images encoded together")

    @model_validator(mode="after")
    def _augmented_views_exist(self) -> Self:
        if "augment" in self.model_fields_set and self.num_views == 1:
            raise ValueError(
                "encode.augment changes all views but the first, and encode.num_views=1: raise it"
            )
        return self


class GeneratorConfig(ChoiceConfig):
    """The text-to-image model. A family's own settings are in a section of its name."""

    kind = "models"
    chosen_by = "family"

    family: str = Field("masked", description="a file of pipeline/models")
    tasks: tuple[str, ...] = Field(
        ("text_to_image",),
        min_length=1,
        description="what it learns to do, in equal shares: files of pipeline/tasks",
    )
    width: int = Field(256, ge=32, le=MAX_WIDTH, description="channels of the network")
    depth: int = Field(6, ge=1, le=MAX_DEPTH, description="transformer blocks")
    heads: int = Field(4, ge=1, le=MAX_WIDTH, description="attention heads per block")
    caption_depth: int = Field(
        1, ge=0, le=MAX_DEPTH, description="trainable blocks over the caption states"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="probability of dropping an activation")
    base_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the weights that training began with in the resulting weights, which "
        "keeps more of what the base knows of concepts that are not shown (WiSE-FT)",
    )
    caption_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of training rows without their caption, for classifier-free guidance",
    )
    style_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of training rows without their style, so that requests may name none",
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="while training")
    rectangle_fraction: float = Field(
        0.15, ge=0, le=1, description="share of the training masks that are rectangles"
    )
    num_styles: int = Field(
        16, ge=1, le=MAX_WIDTH, description="rows of the style table; new styles take free ones"
    )
    guidance_scale: float | None = Field(
        None,
        ge=1,
        le=MAX_GUIDANCE,
        description="default of classifier-free guidance; None: the family's, 3, or 1 for gan",
    )
    guidance_schedule: Literal["constant", "linear"] = Field(
        "constant",
        description="over the decoding steps; linear: from 1 at the first step to guidance_scale",
    )
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, description="default of sampling")
    num_steps: int = Field(12, ge=1, le=MAX_STEPS, description="default of decoding steps")
    data: ImageFilter = ImageFilter()
    train: TrainConfig = TrainConfig()

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is there twice, and all are learnt in equal shares")
        return tasks

    @field_validator("family")
    @classmethod
    def _family_exists(cls, family: str) -> str:
        registry.part("models", family, "FAMILY")
        return family

    @classmethod
    def section_of(cls, name: str) -> type[Config]:
        """See `contracts.Family.options`."""
        options: type[Config] = registry.part("models", name, "FAMILY").options
        return options


class EvaluateConfig(Config):
    """What is measured, and on how many images."""

    num_images: int = Field(200, ge=8, description="images per set, and captions to choose from")
    num_other_images: int | None = Field(
        None,
        ge=8,
        description="images per set of the further styles and languages; None: num_images",
    )
    styles: tuple[str, ...] = Field(
        (), description="styles to evaluate; the promotion gate reads the first; empty: all"
    )
    languages: tuple[str, ...] = Field(
        ("en", "zh"),
        min_length=1,
        description="languages of the captions; the promotion gate reads the first, the others are "
        "evaluated on the first style alone",
    )
    guidance_scales: tuple[Annotated[float, Field(ge=1, le=MAX_GUIDANCE)], ...] = Field(
        (), description="further guidance scales to evaluate, to show what guidance does"
    )
    bootstrap: int = Field(1_000, ge=100, description="resamples per interval")
    seed: int = Field(0, ge=0, description="seed of the choice of images, requests and resamples")
    batch_size: int = Field(50, ge=1, description="images generated together")
    judges: tuple[JudgeName, ...] = Field(
        ("aligner", "imagenet"),
        min_length=1,
        description="what tells how well an image fits a caption: aligner, imagenet, clip:ID and "
        "siglip:ID, where ID is a hub id or a directory",
    )
    features: FeaturesName = Field(
        "imagenet",
        description="what distances between sets of images are measured in: imagenet, "
        "dinov2:ID or inception",
    )
    num_workers: int = Field(
        2,
        ge=1,
        description="processes that measure; the numbers are the same with any number",
    )
    compositions: bool = Field(
        True,
        description="also draw the fixed prompts that are in no training set "
        "(pipeline/evaluation/compositions.yaml), in English and Chinese",
    )

    @field_validator("judges")
    @classmethod
    def _judges_differ(cls, judges: tuple[str, ...]) -> tuple[str, ...]:
        return check_judges(judges)


class TrackingConfig(Config):
    """Where runs are recorded besides MLflow."""

    sinks: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="each needs the extra of its name; see pipeline/tracking/sinks.py"
    )


class Recipe(Config):
    """One use of Tessera, from captioned images to a served champion."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    base: str | None = Field(
        None,
        description="bundle to start from: a directory, asset:base, or models:/NAME@ALIAS; "
        "None trains tokenizer and generator from scratch",
    )
    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    caption_encoder: CaptionEncoderConfig = CaptionEncoderConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    encode: EncodeConfig = EncodeConfig()
    generator: GeneratorConfig = GeneratorConfig()
    candidates: dict[str, dict[str, Any]] = Field(
        {},
        description="several generators to train, by name, each with its changes to the section "
        "`generator`; the best by promote.choose_by is the candidate for promotion",
    )
    aligner: AlignerConfig = AlignerConfig()
    imagenet_judge: ImageNetJudgeConfig = ImageNetJudgeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()
    tune: TuneConfig | None = Field(None, description="the search of `tessera tune`; None: none")

    @property
    def generators(self) -> dict[str, GeneratorConfig]:
        """The candidates' sections by name; a recipe with one generator calls it "candidate"."""
        if not self.candidates:
            return {"candidate": self.generator}
        return {name: self._candidate(name) for name in self.candidates}

    def _candidate(self, name: str) -> GeneratorConfig:
        changed = merged(stated(self.generator), self.candidates[name])
        return GeneratorConfig.model_validate(changed)

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """This recipe without its section `tune`, with other values for dotted keys, checked again.

        Raises:
            RecipeError: an unknown key or a value that does not fit.
        """
        values = stated(self)
        values.pop("tune", None)
        for key, value in settings.items():
            set_key(values, key, value, origin=key)
        try:
            return type(self).model_validate(values)
        except ValidationError as error:
            raise RecipeError(explain(error, Recipe)) from error

    @model_validator(mode="after")
    def _every_end_of_the_search_is_a_recipe(self) -> Self:
        if self.tune is None:
            return self
        steps = self.generator.train.max_steps
        if self.tune.grace_steps > steps:
            raise ValueError(
                f"tune.grace_steps={self.tune.grace_steps} is more than "
                f"generator.train.max_steps={steps}: no trial could ever be stopped"
            )
        section = {"generator": stated(self.generator)}
        unsearchable = registry.part("models", self.generator.family, "FAMILY").unsearchable
        for key, space in self.tune.space.items():
            if reason := unsearchable.get(key.removeprefix("generator.")):
                raise ValueError(f"tune.space: {key!r} cannot be searched: {reason}")
            for value in space.ends:  # values together are checked as they are drawn
                values = copy.deepcopy(section)
                set_key(values, key, value, origin=key)
                try:
                    GeneratorConfig.model_validate(values["generator"])
                except ValidationError as error:
                    said = explain(error, Recipe, ("generator",))
                    raise ValueError(f"tune.space: {said}") from error
        return self

    @model_validator(mode="after")
    def _every_candidate_is_a_generator(self) -> Self:
        names = list(self.candidates)
        if len(names) == 1:
            raise ValueError(
                f"candidates lists {names[0]!r} alone: list at least two, or say in the section "
                "`generator` what the one shall be"
            )
        for name in names:
            if name in SUBJECTS or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
                raise ValueError(
                    f"candidates: {name!r} is no name for one: use small letters, digits and "
                    f"hyphens, and none of {', '.join(sorted(SUBJECTS))}"
                )
        if names and self.tune is not None:
            raise ValueError(
                "tune searches the settings of one generator: remove `candidates` or `tune`"
            )
        made: dict[str, str] = {}
        for name in names:
            try:
                config = self._candidate(name)
            except ValidationError as error:
                place = ("candidates", name)
                raise ValueError(explain(error, Recipe, ("generator",), shown=place)) from error
            _check_train(config.train, f"candidates.{name}.train")
            same = made.setdefault(config.completed().model_dump_json(), name)
            if same != name:
                raise ValueError(
                    f"candidates: {same} and {name} are the same generator: change one of them, "
                    "its train.seed for example"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.base is None and self.tokenizer.source is None:  # whose sizes would be taken
            self.tokenizer.check_grid(self.preprocess.image_size)
        for name, augment in (
            ("aligner.train", self.aligner.train.augment),
            ("encode", self.encode.augment),
        ):
            check_unmixed(augment, name)
        _check_train(self.tokenizer.train, "tokenizer.train")
        if self.tokenizer.train.policy == "head" and not (self.base or self.tokenizer.source):
            raise ValueError(
                "tokenizer.train.policy=head trains the decoder of a tokenizer that there is: name "
                "it with tokenizer.source or base"
            )
        _check_train(self.aligner.train, "aligner.train")
        shares = [g.base_share for g in self.generators.values() if g.base_share]
        if shares and self.base is None:
            raise ValueError(
                f"generator.base_share={shares[0]} is of a base's weights, and there is none: "
                "leave it out, or say with `base` which bundle to start from"
            )
        _check_train(self.generator.train, "generator.train")
        return self


def _check_train(train: TrainConfig, name: str) -> None:
    if train.batch_size % (train.num_workers * train.accumulate):
        raise ValueError(
            f"{name}.batch_size={train.batch_size} must be a multiple of "
            f"{name}.num_workers={train.num_workers} times {name}.accumulate={train.accumulate}"
        )


def recipe_names() -> list[str]:
    """The recipes that ship with Tessera."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Recipe:
    """Read a recipe by name or path, apply overrides, check everything.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file.
        overrides: "dotted.key=value" each; the value is read as YAML.
        environment: TESSERA__SECTION__KEY=value; os.environ unless given.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key or a value of the wrong type.
    """
    path = _find(recipe)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, not {type(values).__name__}")
    return make_recipe(values, overrides, name=path.stem, environment=environment)


def make_recipe(
    values: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    name: str,
    environment: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe from nested settings, with overrides, checked.

    Args:
        values: as a recipe's file has them; changed by the overrides.
        overrides, environment: as `load_recipe` takes them.
        name: for error messages.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
    """
    _override_from(environment, values)
    for given in overrides:
        key, equals, value = given.partition("=")
        if not equals:
            raise RecipeError(f"override {given!r} is not of the form section.key=value")
        override(values, key.strip(), value, origin=given)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {explain(error, Recipe)}") from error


def load_serve_section(
    environment: Mapping[str, str] | None = None, section: Mapping[str, Any] | None = None
) -> ServeConfig:
    """The section `serve` as the environment says it, else `section`, else the defaults.

    Args:
        environment: TESSERA__SERVE__KEY=value; os.environ unless given.
        section: settings of a recipe or another file.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
    """
    values: dict[str, Any] = {"serve": dict(section or {})}
    _override_from(environment, values)
    if unknown := sorted(values.keys() - Recipe.model_fields.keys()):
        known = ", ".join(Recipe.model_fields)
        raise RecipeError(f"unknown key {unknown[0]!r} in the environment; known here: {known}")
    try:
        return ServeConfig.model_validate(values["serve"])
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, inside=("serve",))) from error


def _override_from(environment: Mapping[str, str] | None, values: dict[str, Any]) -> None:
    environment = os.environ if environment is None else environment
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            override(values, key, environment[name], origin=name)


def _find(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError(f"no recipe file at {path}")
        return path
    shipped = RECIPES / f"{recipe}.yaml"
    if not shipped.is_file():
        near = difflib.get_close_matches(str(recipe), recipe_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"no recipe is called {str(recipe)!r}; there are: {', '.join(recipe_names())}, "
            f"or give the path of a .yaml file.{hint}"
        )
    return shipped
