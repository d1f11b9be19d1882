"""Mistakes that a recipe and its data already show: told at once, not after hours of work.

The networks are built on PyTorch's meta device, where they have shapes and no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from pipeline import generation, registry
from pipeline.aligner import Aligner
from pipeline.artifacts import resolve_path
from pipeline.bundle import read_bundle
from pipeline.config import GeneratorConfig, ImageFilter, Recipe, TokenizerConfig
from pipeline.contracts import ImageTokenizer
from pipeline.errors import RecipeError
from pipeline.finetune import apply_policy
from pipeline.idle import idle_settings
from pipeline.models import load_family
from pipeline.pretrained import find_vgg
from pipeline.shards import Manifest, check_one_file_system, open_shards
from pipeline.text import HFCaptionEncoder, check_encoder
from pipeline.tokenizers._saved import load_tokenizer

logger = logging.getLogger(__name__)


def check_recipe(
    recipe: Recipe,
    manifests: Mapping[str, Manifest],
    encoder: HFCaptionEncoder,
    *,
    tokenizer: TokenizerConfig | None,
    base: Path | None,
    cache: Path,
) -> None:
    """What the recipe names is there and fits; what it says without effect is logged.

    Args:
        manifests: of the shard sets.
        encoder: the recipe's caption encoder.
        tokenizer: the section, with what it takes from its source; None if none is trained.
        base: the bundle that generators start from.
        cache: where pretrained weights are converted to.

    Raises:
        RecipeError: a style that no picture has.
        DataError: shard sets on several file systems.
        BundleError: the base, or a given aligner, read captions through another encoder.
        MissingExtraError: the perceptual loss without its packages.
        PretrainedNotFoundError: the perceptual loss' features cannot be had.
    """
    for idle in idle_settings(recipe):
        logger.warning(str(idle))
    check_data(recipe, manifests)
    if base is not None:
        check_encoder(read_bundle(base).encoder, encoder)
    if recipe.aligner.source is not None:
        aligner = Aligner.load(resolve_path(recipe.aligner.source))
        assert aligner.encoder is not None, "a saved one has it"
        check_encoder(aligner.encoder, encoder)
    if tokenizer is not None and tokenizer.perceptual_weight:
        find_vgg(tokenizer.perceptual_features, cache=cache)


def check_data(recipe: Recipe, manifests: Mapping[str, Manifest]) -> None:
    """The styles that the recipe names exist, and one file system holds all shard sets.

    Raises:
        RecipeError: a style that no picture has.
        DataError: shard sets on several file systems.
    """
    known = _styles(manifests)
    for key, styles in _named_styles(recipe):
        if unknown := [style for style in styles if style not in known]:
            raise RecipeError(
                f"{key} names {', '.join(unknown)}, which no picture has; the styles are "
                f"{', '.join(known)}"
            )
    systems = [open_shards(uri, manifest)[0] for uri, manifest in manifests.items()]
    check_one_file_system(systems, manifests)


def _styles(manifests: Mapping[str, Manifest]) -> list[str]:
    """Of all pictures."""
    return sorted({style for manifest in manifests.values() for style in manifest.styles})


def _named_styles(recipe: Recipe) -> Iterator[tuple[str, Sequence[str]]]:
    filters: dict[str, ImageFilter] = {"tokenizer.data": recipe.tokenizer.data}
    for name, config in recipe.generators.items():
        place = f"candidates.{name}" if recipe.candidates else "generator"
        filters[f"{place}.data"] = config.data
    for key, only in filters.items():
        yield f"{key}.styles", only.styles
        yield f"{key}.exclude_styles", only.exclude_styles
        yield f"{key}.style_weights", tuple(only.style_weights)
    yield "evaluate.styles", recipe.evaluate.styles


def check_networks(
    recipe: Recipe,
    *,
    tokenizer: TokenizerConfig,
    given_tokenizer: Path | None,
    encoder: HFCaptionEncoder,
) -> ImageTokenizer:
    """The tokenizer and the aligner, if they are trained, can be built, and trained by their
    policies and optimisers.

    Args:
        tokenizer: the section, with what it takes from its source.
        given_tokenizer: the directory of one that is taken as it is; None if one is trained.
        encoder: the recipe's caption encoder.

    Returns:
        The tokenizer; without weights if it is trained.

    Raises:
        RecipeError: sizes, a policy or an optimiser that do not fit.
    """
    size = recipe.preprocess.image_size
    made: ImageTokenizer | None = (
        None if given_tokenizer is None else load_tokenizer(given_tokenizer)
    )
    with torch.device("meta"):
        if made is None:
            tokenizer.check_grid(size)
            made = registry.load("tokenizers", tokenizer.name).build(tokenizer, size)
            apply_policy(made, tokenizer.train)
        if recipe.aligner.source is None:
            aligner = Aligner(recipe.aligner, image_size=size, caption_width=encoder.width)
            apply_policy(aligner, recipe.aligner.train)
    return made


def check_generator_network(
    config: GeneratorConfig,
    manifests: Mapping[str, Manifest],
    *,
    tokenizer: ImageTokenizer,
    base: Path | None,
    encoder: HFCaptionEncoder,
    language_model: str | None,
) -> None:
    """A generator can be built, and trained by its policy and optimiser.

    Args:
        config: the section, with what it takes from the base.
        manifests: of the shard sets.
        tokenizer: whose tokens it draws; its weights do not matter.
        base: the bundle that it starts from.
        encoder: the recipe's caption encoder.
        language_model: where its pretrained one lies, if it has one.

    Raises:
        RecipeError: sizes, a policy or an optimiser that do not fit, more styles than places.
        MissingExtraError: lora without its package.
    """
    kept = config.data.kept(_styles(manifests))
    spec = generation.make_spec(tokenizer, encoder.width, kept, base, config, language_model)
    with torch.device("meta"):
        apply_policy(load_family(config.family).build(config, spec), config.train)
