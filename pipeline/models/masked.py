"""The masked family (BERT type): fills in hidden image tokens in a few parallel steps.

Any pretrained language model reads the caption; a bidirectional transformer over its states
predicts the image tokens (networks/masked.py). The default family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.config.section import Config
from pipeline.contracts import Family, ImageGenerator, ModelParts, ModelSpec
from pipeline.models._shape import TRANSFORMER_SHAPE, check_heads

if TYPE_CHECKING:
    from pipeline.config import GeneratorConfig
    from pipeline.models.networks.masked import MaskedTransformer
    from pipeline.objective import Objective


class MaskedConfig(Config):
    """The family has no settings beyond those that all families share."""


class Masked(Family):
    """See `contracts.Family`."""

    options = MaskedConfig
    reads_source = True
    shape_fields = TRANSFORMER_SHAPE
    unsearchable: Mapping[str, str] = {
        "rectangle_fraction": "it shapes the masks that trials are validated with"
    }

    def check(self, config: GeneratorConfig, section: str) -> None:
        """Refuse a width that the attention heads cannot share."""
        check_heads(config, section)

    def build(self, config: GeneratorConfig, spec: ModelSpec) -> MaskedTransformer:
        """A freshly initialised network."""
        from pipeline.models.networks.masked import MaskedTransformer

        return MaskedTransformer(config, spec)

    def objective(self, model: MaskedTransformer, config: GeneratorConfig) -> Objective:
        """Cross-entropy over the hidden image tokens."""
        from pipeline.models.networks.masked import MaskedObjective

        return MaskedObjective(model, config)

    def generator(
        self,
        model: MaskedTransformer,
        config: GeneratorConfig,
        spec: ModelSpec,
        parts: ModelParts,
    ) -> ImageGenerator:
        """Parallel decoding with classifier-free guidance."""
        from pipeline.models.networks.masked import MaskedGenerator

        return MaskedGenerator(model, config, spec, parts)


FAMILY = Masked()
