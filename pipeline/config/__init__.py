"""What a recipe may say: every setting with its default, its unit and its limits.

recipe.py holds the recipe, its smaller sections and how it is read; each larger section has a file
of its own. A model family's and a tokenizer's own sections are in their own files, below
pipeline/models and pipeline/tokenizers.

    recipe = load_recipe("emoji-demo", overrides=["generator.train.max_steps=100"])
"""

from pipeline.config.data import AugmentConfig, DataConfig, ImageFilter, PreprocessConfig
from pipeline.config.judges import AlignerConfig, ImageNetJudgeConfig
from pipeline.config.promote import CanaryConfig, PromoteConfig
from pipeline.config.recipe import (
    MAX_GUIDANCE,
    MAX_STEPS,
    MAX_TEMPERATURE,
    CaptionEncoderConfig,
    EncodeConfig,
    EvaluateConfig,
    GeneratorConfig,
    Recipe,
    TrackingConfig,
    load_recipe,
    load_serve_section,
    make_recipe,
    recipe_names,
)
from pipeline.config.section import Config
from pipeline.config.serve import ServeConfig
from pipeline.config.tokenizer import TokenizerConfig
from pipeline.config.train import TrainConfig
from pipeline.config.tune import TuneConfig

__all__ = [
    "MAX_GUIDANCE",
    "MAX_STEPS",
    "MAX_TEMPERATURE",
    "AlignerConfig",
    "AugmentConfig",
    "CanaryConfig",
    "CaptionEncoderConfig",
    "Config",
    "DataConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "GeneratorConfig",
    "ImageFilter",
    "ImageNetJudgeConfig",
    "PreprocessConfig",
    "PromoteConfig",
    "Recipe",
    "ServeConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "TuneConfig",
    "load_recipe",
    "load_serve_section",
    "make_recipe",
    "recipe_names",
]
