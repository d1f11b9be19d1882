"""The GAN family: noise and a caption become an image in one pass.

The frozen language model's caption states condition a convolutional generator, against a
discriminator that is shown mismatched captions (networks/gan.py). It works on pixels, without image
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config.section import MAX_WIDTH, Config
from pipeline.contracts import Family, ImageGenerator, ModelParts, ModelSpec

if TYPE_CHECKING:
    from pipeline.config import GeneratorConfig
    from pipeline.models.networks.gan import OnePassGenerator
    from pipeline.objective import Objective

_UNREAD = (
    "depth", "heads", "caption_depth", "dropout", "label_smoothing", "rectangle_fraction",
    "guidance_schedule", "num_steps",
)  # fmt: skip


class GanConfig(Config):
    """The section `generator.gan`."""

    channels: int = Field(
        48,
        ge=8,
        le=MAX_WIDTH,
        description="channels at the finest grid; coarser ones have up to 8x",
    )
    patch: int = Field(
        2, ge=1, description="pixels per side that a position of the finest grid stands for"
    )
    noise_width: int = Field(64, ge=1, le=MAX_WIDTH, description="dimensions of the noise")
    penalty_weight: float = Field(2.0, ge=0, description="weight of the gradient penalty")
    penalty_power: float = Field(
        6.0, gt=0, description="power of the gradient's norm in the penalty"
    )
    penalty_fraction: float = Field(
        0.125, gt=0, le=1, description="share of each batch that the gradient penalty sees"
    )
    contrastive_weight: float = Field(
        1.0,
        ge=0,
        description="weight of finding an image's caption among those of the batch, in the losses "
        "of both networks",
    )
    reconstruction_weight: float = Field(
        5.0,
        ge=0,
        description="weight of the difference to the caption's own image; lower it for data with "
        "many images per caption; 0: adversarial losses alone",
    )
    discriminator_learning_rate_ratio: float = Field(
        4.0, gt=0, description="the discriminator's learning rate, as a multiple of the generator's"
    )
    augment: bool = Field(
        True,
        description="change colours, shift and cut out differentiably before the discriminator",
    )


class Gan(Family):
    """See `contracts.Family`."""

    options = GanConfig
    reads = "images"
    shape_fields = ("width", "num_styles", "gan.channels", "gan.patch", "gan.noise_width")

    def unread(self, config: GeneratorConfig) -> Mapping[str, str]:
        """The settings of transformers."""
        return dict.fromkeys(_UNREAD, "on the family gan")

    def build(self, config: GeneratorConfig, spec: ModelSpec) -> OnePassGenerator:
        """A freshly initialised network."""
        from pipeline.models.networks.gan import OnePassGenerator

        return OnePassGenerator(config, spec)

    def objective(self, model: OnePassGenerator, config: GeneratorConfig) -> Objective:
        """Hinge, contrastive and pixel losses of generator and discriminator."""
        from pipeline.models.networks.gan import GanObjective

        return GanObjective(model, config)

    def generator(
        self,
        model: OnePassGenerator,
        config: GeneratorConfig,
        spec: ModelSpec,
        parts: ModelParts,
    ) -> ImageGenerator:
        """One pass of the network."""
        from pipeline.models.networks.gan import GanGenerator

        return GanGenerator(model, config, spec, parts)


FAMILY = Gan()
