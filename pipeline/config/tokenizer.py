"""The recipe's section `tokenizer`: the image tokenizer and its training.

The other sections, and reading recipes, are in pipeline/config/recipe.py.
"""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, field_validator, model_validator

from pipeline import registry
from pipeline.config.data import ImageFilter
from pipeline.config.section import MAX_WIDTH, ChoiceConfig, Config, Depth, Width
from pipeline.config.train import TrainConfig
from pipeline.errors import RecipeError

MAX_CODES = 65_536
"""The largest codebook: image tokens are stored as 16-bit numbers."""
ATTENTION_HEADS = 4
"""Of the self-attention over the token grid."""


class TokenizerConfig(ChoiceConfig):
    """The self-supervised autoencoder: image <-> grid of discrete tokens.

    The settings of fsq and vq stand in this section itself, those of any other tokenizer in a
    section of its name.
    """

    kind = "tokenizers"
    chosen_by = "name"

    name: str = Field("fsq", description="a file of pipeline/tokenizers")
    levels: tuple[int, ...] = Field(
        (8, 8, 5, 5, 5), description="fsq: levels per channel; the codebook size is their product"
    )
    codebook_size: int = Field(4_096, ge=2, le=MAX_CODES, description="vq: number of codes")
    code_width: int = Field(8, ge=2, le=MAX_WIDTH, description="vq: dimensions of a code")
    commitment_weight: float = Field(0.25, ge=0, description="vq: draws latents to their codes")
    entropy_weight: float = Field(0.1, ge=0, description="vq: keeps all codes in use")
    downsample: int = Field(8, ge=2, description="pixels per token, per side")
    patch: int = Field(4, ge=1, description="pixels per patch, per side: the encoder's first step")
    widths: tuple[Width, Width] = Field(
        (128, 256), description="channels at the patch and token grids"
    )
    encoder_depths: tuple[Depth, Depth] = Field(
        (1, 2), description="residual blocks at either grid"
    )
    decoder_depths: tuple[Depth, Depth] = Field(
        (2, 3), description="residual blocks at either grid"
    )
    l1_weight: float = Field(1.0, ge=0, description="of the mean absolute difference")
    l2_weight: float = Field(5.0, ge=0, description="of the mean squared difference")
    gradient_weight: float = Field(
        1.0, ge=0, description="L1 of horizontal and vertical differences"
    )
    perceptual_weight: float = Field(0.0, ge=0, description="VGG features; 0 switches the term off")
    perceptual_fraction: float = Field(
        0.25, gt=0, le=1, description="the part of each batch that the perceptual term sees"
    )
    perceptual_features: str = Field("hed-vgg16", description="vgg.VGG_SOURCES or a path")
    adversarial_weight: float = Field(
        0.0, ge=0, description="of a patch discriminator's loss, best in a training on `source`"
    )
    adversarial_channels: int = Field(
        48, ge=8, le=MAX_WIDTH, description="of the discriminator's first layer"
    )
    source: str | None = Field(
        None,
        description="training goes on from its weights: a tokenizer's or bundle's directory, or "
        "asset:base; None starts from scratch, or with policy head from the recipe's base",
    )
    freeze: bool = Field(False, description="take `source` as it is instead of training on")
    data: ImageFilter = ImageFilter()
    train: TrainConfig = Field(
        TrainConfig(),
        description="policy full, or head: the decoder alone, so that image tokens keep their "
        "meaning and generators that were trained on them stay valid",
    )

    def is_trained(self, *, on_base: bool) -> bool:
        """Whether there is anything to train in a recipe with a base, or in one without."""
        return self.train.policy == "head" or not (on_base or self.freeze)

    @classmethod
    def section_of(cls, name: str) -> type[Config]:
        """See `contracts.TokenizerKind.options`."""
        options: type[Config] = registry.part("tokenizers", name, "TOKENIZER").options
        return options

    @field_validator("name")
    @classmethod
    def _tokenizer_exists(cls, name: str) -> str:
        if name not in registry.names("tokenizers"):
            registry.load("tokenizers", name)  # says what there is
        return name

    @field_validator("levels")
    @classmethod
    def _codes_fit_16_bits(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if (
            not levels
            or not 2 <= min(levels) <= max(levels) <= 1_000
            or (math.prod(levels) > MAX_CODES)
        ):
            raise ValueError(
                f"levels of 2 to 1,000 whose product, the codebook, is at most {MAX_CODES:,}; this "
                f"product is {math.prod(levels):,}"
            )
        return levels

    @field_validator("widths")
    @classmethod
    def _heads_share_the_width(cls, widths: tuple[int, int]) -> tuple[int, int]:
        if widths[1] % ATTENTION_HEADS:
            raise ValueError(
                f"the second must be a multiple of {ATTENTION_HEADS}, the heads of the attention "
                "over the token grid"
            )
        return widths

    def check_grid(self, image_size: int) -> None:
        """Raises RecipeError if images of that size are no whole number of tokens."""
        if image_size % self.downsample:
            raise RecipeError(
                f"preprocess.image_size={image_size} must be a multiple of "
                f"tokenizer.downsample={self.downsample}"
            )

    @model_validator(mode="after")
    def _frozen_has_a_source(self) -> Self:
        if self.freeze and self.source is None:
            raise ValueError("tokenizer.freeze=true needs tokenizer.source: what to take as it is")
        return self

    @model_validator(mode="after")
    def _trains_all_or_the_decoder(self) -> Self:
        policy = self.train.policy
        if policy not in ("full", "head"):
            raise ValueError(
                f"tokenizer.train.policy={policy}: a tokenizer trains in full, or its decoder "
                "alone (head)"
            )
        if self.freeze and policy == "head":
            raise ValueError("tokenizer.freeze=true and tokenizer.train.policy=head: leave out one")
        return self
