"""The recipe's sections on data: which images, what they become, and how training varies them.

The other sections, and reading recipes, are in pipeline/config/recipe.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from pipeline.config.section import Config
from pipeline.errors import RecipeError


class ImageFilter(Config):
    """Which of the preprocessed images a training sees, and how often."""

    styles: tuple[str, ...] = Field((), description="styles to keep; empty keeps all")
    exclude_styles: tuple[str, ...] = Field((), description="styles to leave out")
    group_exponent: float = Field(
        1.0,
        ge=0,
        le=1,
        description="training draws a group of n images in proportion to n to this power; 1: every "
        "image is drawn equally often; 0: every group is, however many images it has",
    )
    style_weights: dict[str, PositiveFloat] = Field(
        {},
        description="by style, how often training draws an image of it; 1 for styles not named",
    )

    def kept(self, styles: Iterable[str]) -> list[str]:
        """The styles among `styles` that the filter keeps, sorted."""
        wanted = set(self.styles or styles) - set(self.exclude_styles)
        return sorted(wanted.intersection(styles))


class DataConfig(Config):
    """Which captioned images, and how they are split into training, validation and test."""

    shards: tuple[str, ...] = Field(
        ("asset:emoji",),
        min_length=1,
        description="shard sets: directories or URIs that hold a manifest.json; "
        "asset:NAME is one that ships with Tessera, home:NAME one that lies under --home",
    )
    validation_fraction: float = Field(
        0.05, gt=0, lt=0.5, description="share of the groups in the validation split"
    )
    test_fraction: float = Field(
        0.10, gt=0, lt=0.5, description="share of the groups in the test split"
    )
    split_seed: int = Field(0, ge=0, description="a group's split depends on (group, seed) alone")
    limit: int | None = Field(
        None, ge=8, description="use this many groups, chosen by hash; None: all"
    )
    allow_missing_shards: bool = Field(
        False,
        description="go on without shards that are missing or damaged, and count what is lost",
    )

    @field_validator("shards")
    @classmethod
    def _each_once(cls, shards: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [uri for uri, times in Counter(shards).items() if times > 1]:
            raise ValueError(f"{', '.join(twice)} is named twice: name each shard set once")
        return shards

    @property
    def split(self) -> str:
        """The settings that decide which groups are held out, as text."""
        return (
            f"seed {self.split_seed}, validation {self.validation_fraction:g}, "
            f"test {self.test_fraction:g}"
        )


class PreprocessConfig(Config):
    """How an encoded image becomes image_size x image_size uint8 RGB, and what is refused."""

    image_size: int = Field(64, ge=16, le=1024, description="pixels per side")
    square: Literal["pad", "center_crop", "random_crop"] = Field(
        "pad", description="how an image becomes square: white padding, or a crop"
    )
    crop_seed: int = Field(0, ge=0, description="random_crop depends on (key, seed) alone")
    min_side: int = Field(
        16, ge=1, description="pixels; images with a shorter side are quarantined"
    )
    max_aspect: float = Field(
        4.0, ge=1, description="long side / short side; images beyond it are quarantined"
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="width * height; images with more are quarantined"
    )
    max_caption_chars: int = Field(
        1_000,
        ge=1,
        description="a longer caption is left out; a sample that has no other is quarantined",
    )
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="largest share of bad samples, above which the job fails; what `languages` and "
        "`deduplicate` leave out is not bad",
    )
    require_captions: bool = Field(
        True, description="false keeps images without captions, to train a tokenizer on"
    )
    languages: tuple[str, ...] = Field(
        (), description="languages of the captions to keep; zh keeps zh-hant too; empty keeps all"
    )
    deduplicate: Literal["no", "exact", "perceptual"] = Field(
        "no",
        description="keep one of several images with equal pixels (exact), or also of images whose "
        "perceptual hashes nearly agree; a held-out image is kept before a training image",
    )
    perceptual_distance: int = Field(
        4,
        ge=0,
        le=12,
        description="bits of 64 in which perceptual hashes of near duplicates may differ",
    )


class AugmentConfig(Config):
    """Random changes to whole batches of images, applied on the training device."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    zoom: float = Field(
        0.0, ge=0, le=0.5, description="scale by a factor from 1 - zoom to 1 + zoom"
    )
    shift: int = Field(0, ge=0, le=64, description="translate by up to this many whole pixels")
    color: float = Field(0.0, ge=0, le=1, description="strength of the colour jitter")
    swap_channels: float = Field(0.0, ge=0, le=1, description="probability of permuting R, G, B")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur")
    noise: float = Field(0.0, ge=0, le=1, description="largest sigma of Gaussian noise")
    rotate: float = Field(0.0, ge=0, le=180, description="rotate by up to this many degrees")
    random_crop: float = Field(
        0.0, ge=0, le=1, description="enlarge a random part of at least this share of the area"
    )
    ten_crop: float = Field(
        0.0,
        ge=0,
        le=1,
        description="enlarge one of ten crops (corners, centre, and these mirrored) whose side has "
        "this share of the image's side",
    )
    cutout: float = Field(
        0.0, ge=0, le=1, description="whiten a square of up to this share of the image's side"
    )
    mixup: float = Field(
        0.0, ge=0, le=1, description="probability of blending with another image of the batch"
    )
    cutmix: float = Field(
        0.0, ge=0, le=1, description="probability of pasting a square of another image of the batch"
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
    """Refuse augmentation that mixes images, where every image has a caption of its own.

    Raises:
        RecipeError: mixup or cutmix is above 0.
    """
    if augment.mixup or augment.cutmix:
        raise RecipeError(
            f"{section}.augment mixes pictures (mixup={augment.mixup}, cutmix={augment.cutmix}), "
            "and a mixture has no caption: set both to 0"
        )
