"""The sizes and settings that a generator is built by: where each comes from, and what is refused.

    config = shape_of_base(recipe.generator, base)
    check_generator(config)
    spec = make_spec(tokenizer, caption_width, styles, base, config)

No weights are read; `pipeline.chain.plan` resolves every candidate of a recipe with these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bundles.bundle import read_bundle
from pipeline.config import GeneratorConfig
from pipeline.config.data import check_unmixed
from pipeline.config.overrides import shaped_like
from pipeline.contracts import ImageTokenizer, ModelSpec
from pipeline.errors import RecipeError
from pipeline.models import families_that, load_family
from pipeline.tasks import gives_source


def check_generator(config: GeneratorConfig, section: str = "generator") -> None:
    """Refuse what a generator's section says that its family cannot do: tasks that do not exist or
    that the family cannot learn, augmentation where it sees no pixels, sizes that do not fit.

    Raises:
        RecipeError: names the setting and what there is.
    """
    family = load_family(config.family)
    family.check(config, section)
    augment = config.train.augment
    reads_tokens = family.reads == "image_tokens"
    if reads_tokens and any(getattr(augment, name) for name in augment.model_fields_set):
        raise RecipeError(
            f"{section}.train.augment: the family {config.family} trains on image tokens, encoded "
            "once; augment the views they are made of in the section `encode`"
        )
    if not reads_tokens:
        check_unmixed(augment, f"{section}.train")
    if gives_source(config.tasks) and not family.reads_source:
        able = families_that(lambda family: family.reads_source)
        raise RecipeError(
            f"{section}.tasks={list(config.tasks)}: the family {config.family} sees no source "
            f"picture; take text_to_image alone, or one of the families {', '.join(able)}"
        )


def shape_of_base(config: GeneratorConfig, base: Path | None) -> GeneratorConfig:
    """The recipe's generator section with what it leaves open of the network's shape from the base;
    as it is without a base.

    Raises:
        RecipeError: the recipe sets a shape that is not the base's.
        BundleError: the base cannot be read.
    """
    if base is None:
        return config.completed()
    built = read_bundle(base).generator
    values = shaped_like(config, built, ("family",), section="generator", whose="the base's")
    values.setdefault("tasks", built.tasks)
    config = GeneratorConfig.model_validate(values).completed()
    values = shaped_like(
        config, built.completed(), load_family(config.family).shape_fields,
        section="generator", whose="the base's",
    )  # fmt: skip
    return GeneratorConfig.model_validate(values)


def make_spec(
    tokenizer: ImageTokenizer,
    caption_width: int,
    styles: Sequence[str],
    base: Path | None,
    config: GeneratorConfig,
    language_model: str | None = None,
) -> ModelSpec:
    """The sizes a generator is built by; a base's styles keep their places.

    Args:
        tokenizer: the one whose tokens it draws.
        caption_width: of the caption encoder's states.
        styles: of the images that it trains on.
        base: the bundle it starts from.
        language_model: where a causal family's pretrained one lies.

    Raises:
        RecipeError: more styles than generator.num_styles.
    """
    known = read_bundle(base).model_spec.styles if base else ()
    names = (*known, *sorted(set(styles) - set(known)))
    if len(names) > config.num_styles:
        raise RecipeError(
            f"{len(names)} styles ({', '.join(names)}) do not fit generator.num_styles="
            f"{config.num_styles}; raise it or filter generator.data.styles"
        )
    return ModelSpec(
        image_size=tokenizer.image_size,
        codebook_size=tokenizer.codebook_size,
        num_tokens=tokenizer.grid_size**2,
        levels=tokenizer.levels,
        caption_width=caption_width,
        styles=names,
        language_model=_language_model_config(config, base, language_model),
    )


def _language_model_config(
    config: GeneratorConfig, base: Path | None, source: str | None
) -> Mapping[str, Any]:
    found = (
        read_bundle(base).model_spec.language_model
        if base is not None
        else load_family(config.family).language_model_config(config, source)
    )
    dropout = {"attention_dropout": config.dropout} if "attention_dropout" in found else {}
    return {**found, **dropout}
