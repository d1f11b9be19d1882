"""The recipe's sections on evaluation's judges: the aligner, and the judge over ImageNet features.

Which of them judge is said in `evaluate.judges`. The other sections, and reading recipes, are in
pipeline/config/recipe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.data import AugmentConfig
from pipeline.config.section import Config
from pipeline.config.train import TrainConfig

TRAINED_JUDGES = ("aligner", "imagenet")
HUB_JUDGES = ("clip", "siglip")
"""Judges that are pretrained image-text models: `clip:ID`, where ID is a hub id or a directory."""
PLAIN_FEATURES = ("imagenet", "inception")
HUB_FEATURES = ("dinov2",)
"""Features of pretrained image models, named in the same way."""


def _named(plain: Sequence[str], with_id: Sequence[str], what: str) -> AfterValidator:
    """A check that a name is a plain one, or one with the id of a model after it."""

    def check(name: str) -> str:
        kind, _, model = name.partition(":")
        if name not in plain and not (kind in with_id and model):
            known = ", ".join([*plain, *(f"{kind}:ID" for kind in with_id)])
            raise ValueError(f"there is no {what} {name!r}; there are: {known}")
        return name

    return AfterValidator(check)


JudgeName = Annotated[str, _named(TRAINED_JUDGES, HUB_JUDGES, "judge")]
"""One of `evaluate.judges`: aligner, imagenet, clip:ID, siglip:ID."""
FeaturesName = Annotated[str, _named(PLAIN_FEATURES, HUB_FEATURES, "image features")]
"""`evaluate.features`: imagenet, inception, dinov2:ID."""


def check_judges(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse two judges whose metrics would have the same name.

    Raises:
        ValueError: two of one kind.
    """
    kinds = [name.partition(":")[0] for name in names]
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(f"{', '.join(twice)} is there twice: name one judge of each kind")
    return names


Width = Annotated[int, Field(ge=8, le=2_048)]
Depth = Annotated[int, Field(ge=0, le=32)]


class AlignerConfig(Config):
    """The contrastive image-caption model that evaluation retrieves captions with."""

    source: str | None = Field(
        None, description="a trained aligner: a directory or asset:aligner; None trains one"
    )
    tune: bool = Field(
        False, description="train on from the weights of `source` instead of taking it as it is"
    )
    embedding: int = Field(256, ge=8, description="dimensions of the shared space")
    widths: tuple[Width, Width, Width] = Field(
        (96, 192, 384), description="channels of the three stages"
    )
    depths: tuple[Depth, Depth, Depth] = Field(
        (2, 2, 2), description="residual blocks of the stages"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="while training")
    degraded: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of each batch of which training also shows a copy that is blurred, "
        "noisy or washed out, and must lose to the image; blur and noise in `train.augment` would "
        "teach the opposite",
    )
    train: TrainConfig = TrainConfig(
        batch_size=256, augment=AugmentConfig(shift=6, color=0.2, flip=0.5)
    )

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to train."""
        return self.source is None or self.tune

    @model_validator(mode="after")
    def _what_is_tuned_has_a_source(self) -> Self:
        if self.tune and self.source is None:
            raise ValueError("aligner.tune=true needs aligner.source: whose weights to go on from")
        return self


class ImageNetJudgeConfig(Config):
    """The judge over frozen ImageNet features: two heads, trained on the recipe's real images."""

    resolution: int = Field(192, ge=128, le=320, description="pixels per side that it looks at")
    num_views: int = Field(
        1,
        ge=1,
        description="variants of each image to train on; the first is the image as it is, the "
        "others are shifted by whole pixels and, where the caption allows, mirrored; each costs as "
        "much as the first",
    )
    shift: int = Field(4, ge=0, le=64, description="largest shift in pixels")
    dropout: float = Field(
        0.3, ge=0, lt=1, description="probability of dropping a feature, while training"
    )
    embedding: int = Field(256, ge=8, description="dimensions of the shared space")
    steps: int = Field(300, ge=1, description="optimiser steps of the heads")
    batch_size: int = Field(512, ge=8, description="images per step")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate (AdamW, cosine)")
    weight_decay: float = Field(0.05, ge=0, description="of the heads' matrices")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="while training")
    held_out: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="share of the groups that a second pair of heads is not shown, to say how well "
        "the judge knows captions that are new to it",
    )
    seed: int = Field(0, ge=0, description="seed of weights, views and batches")
