"""What a recipe may say of the image tokenizer.

The other sections, and reading recipes, are in pipeline/config.py.
"""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, field_validator, model_validator

from pipeline.config_section import Config
from pipeline.data_config import ImageFilter
from pipeline.errors import RecipeError
from pipeline.train_config import TrainConfig

MAX_CODES = 65_536
"""Of a codebook: image tokens are kept as 16-bit numbers."""
ATTENTION_HEADS = 4


class TokenizerConfig(Config):
    """The self-supervised autoencoder: image <-> grid of discrete tokens."""

    name: str = Field("fsq", description="a file of pipeline/tokenizers")
    levels: tuple[int, ...] = Field(
        (8, 8, 5, 5, 5), description="fsq: levels a channel; the codebook size is their product"
    )
    codebook_size: int = Field(4_096, ge=2, le=MAX_CODES, description="vq")
    code_width: int = Field(8, ge=2, description="vq: dimensions of a code")
    commitment_weight: float = Field(0.25, ge=0, description="vq: draws latents to their codes")
    entropy_weight: float = Field(0.1, ge=0, description="vq: keeps all codes in use")
    downsample: int = Field(8, ge=2, description="pixels a token, a side")
    patch: int = Field(4, ge=1, description="pixels a patch, a side: the encoder's first step")
    widths: tuple[int, int] = Field((128, 256), description="channels at the patch and token grids")
    encoder_depths: tuple[int, int] = Field((1, 2), description="residual blocks at either grid")
    decoder_depths: tuple[int, int] = Field((2, 3), description="residual blocks at either grid")
    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(5.0, ge=0)
    gradient_weight: float = Field(
        1.0, ge=0, description="L1 of horizontal and vertical differences"
    )
    perceptual_weight: float = Field(0.0, ge=0, description="VGG features; 0 switches the term off")
    perceptual_fraction: float = Field(
        0.25, gt=0, le=1, description="of each batch that the perceptual term sees"
    )
    perceptual_features: str = Field("hed-vgg16", description="pretrained.VGG_SOURCES or a path")
    adversarial_weight: float = Field(
        0.0, ge=0, description="of a patch discriminator's opinion, best in a training on `source`"
    )
    adversarial_channels: int = Field(48, ge=8, description="of the discriminator's first layer")
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
        "meaning and a generator that draws them its worth",
    )

    def is_trained(self, *, on_base: bool) -> bool:
        """Whether there is anything to train in a recipe with a base, or in one without."""
        return self.train.policy == "head" or not (on_base or self.freeze)

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
        """Raises RecipeError if pictures of that size are no whole number of tokens."""
        down, patch = self.downsample, self.patch
        if image_size % down or down % patch:
            raise RecipeError(
                f"preprocess.image_size={image_size} must be a multiple of "
                f"tokenizer.downsample={down}, and that of tokenizer.patch={patch}"
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
