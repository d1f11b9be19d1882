"""What a recipe may say of its data: which pictures, what they become, how they are varied.

The other sections, and reading recipes, are in pipeline/config.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from pipeline.config_section import Config
from pipeline.errors import RecipeError


class ImageFilter(Config):
    """Which pictures of the preprocessed data a step sees, and how often."""

    styles: tuple[str, ...] = Field((), description="styles to keep; empty keeps all")
    exclude_styles: tuple[str, ...] = Field((), description="styles to leave out")
    group_exponent: float = Field(
        1.0,
        ge=0,
        le=1,
        description="training draws a group of n pictures in proportion to n to this power; 1: "
        "every picture equally often; 0: every group, however many variants it has",
    )
    style_weights: dict[str, PositiveFloat] = Field(
        {},
        description="by style, how often training draws a picture of it; 1 where nothing is said",
    )

    def kept(self, styles: Iterable[str]) -> list[str]:
        """Those of `styles` that pass, sorted."""
        wanted = set(self.styles or styles) - set(self.exclude_styles)
        return sorted(wanted.intersection(styles))


class DataConfig(Config):
    """Which captioned pictures, and how they are split."""

    shards: tuple[str, ...] = Field(
        ("asset:emoji",),
        description="shard sets: directories or URIs that hold a manifest.json; "
        "asset:NAME is one that ships with Tessera, home:NAME one that lies under --home",
    )
    validation_fraction: float = Field(0.05, gt=0, lt=0.5, description="of the groups")
    test_fraction: float = Field(0.10, gt=0, lt=0.5, description="of the groups")
    split_seed: int = Field(0, ge=0, description="a group's split depends on (group, seed) alone")
    limit: int | None = Field(None, ge=8, description="use the first so many groups; None is all")
    allow_missing_shards: bool = Field(
        False, description="go on without shards that are missing or truncated, counting the loss"
    )

    @property
    def split(self) -> str:
        """What decides which concepts are held out."""
        return (
            f"seed {self.split_seed}, validation {self.validation_fraction:g}, "
            f"test {self.test_fraction:g}"
        )


class PreprocessConfig(Config):
    """How an encoded picture becomes image_size x image_size uint8 RGB."""

    image_size: int = Field(64, ge=16, le=1024, description="pixels a side")
    square: Literal["pad", "center_crop", "random_crop"] = Field(
        "pad", description="how a picture that is not square is made so"
    )
    crop_seed: int = Field(0, ge=0, description="random_crop depends on (key, seed) alone")
    min_side: int = Field(16, ge=1, description="pixels; smaller pictures are quarantined")
    max_aspect: float = Field(4.0, ge=1, description="long side / short side")
    max_pixels: int = Field(
        64_000_000, ge=1, description="width * height; images with more are quarantined"
    )
    max_caption_chars: int = Field(1_000, ge=1, description="longer captions are quarantined")
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="bad / promised; above it the job fails. What `languages` and "
        "`deduplicate` leave out is not bad",
    )
    require_captions: bool = Field(
        True, description="false keeps pictures without captions, to train a tokenizer on"
    )
    languages: tuple[str, ...] = Field(
        (), description="captions to keep; zh keeps zh-hant too; empty keeps all"
    )
    deduplicate: Literal["no", "exact", "perceptual"] = Field(
        "no",
        description="keep one of pictures with equal pixels (exact), or also of pictures whose "
        "perceptual hashes nearly agree; held-out pictures stay before training ones",
    )
    perceptual_distance: int = Field(
        4, ge=0, le=12, description="of the 64 bits of perceptual hashes that may differ"
    )


class AugmentConfig(Config):
    """Random changes to whole batches of pictures, applied on the training device."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    zoom: float = Field(0.0, ge=0, le=0.5, description="scale by 1 +- this, uniformly")
    shift: int = Field(0, ge=0, le=64, description="translate by up to so many whole pixels")
    color: float = Field(0.0, ge=0, le=1, description="strength of the colour jitter")
    swap_channels: float = Field(0.0, ge=0, le=1, description="probability of permuting R, G, B")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur")
    noise: float = Field(0.0, ge=0, le=1, description="largest sigma of Gaussian noise")
    rotate: float = Field(0.0, ge=0, le=180, description="turn by up to so many degrees")
    random_crop: float = Field(
        0.0, ge=0, le=1, description="enlarge a random part of at least this share of the area"
    )
    ten_crop: float = Field(
        0.0,
        ge=0,
        le=1,
        description="enlarge one of ten crops (corners, centre, and these mirrored) whose side has "
        "this share of the picture's",
    )
    cutout: float = Field(
        0.0, ge=0, le=1, description="whiten a square with up to this share of the side"
    )
    mixup: float = Field(
        0.0, ge=0, le=1, description="probability of blending with another picture of the batch"
    )
    cutmix: float = Field(
        0.0, ge=0, le=1, description="probability of a square from another picture of the batch"
    )

    @model_validator(mode="after")
    def _one_crop(self) -> AugmentConfig:
        if self.random_crop and self.ten_crop:
            raise ValueError(
                f"augment.random_crop={self.random_crop} and augment.ten_crop={self.ten_crop} "
                "exclude each other: set one to 0"
            )
        return self


def check_unmixed(augment: AugmentConfig, section: str) -> None:
    """Raises RecipeError if pictures that a caption belongs to would be mixed with others."""
    if augment.mixup or augment.cutmix:
        raise RecipeError(
            f"{section}.augment mixes pictures (mixup={augment.mixup}, cutmix={augment.cutmix}), "
            "and a mixture has no caption: set both to 0"
        )
