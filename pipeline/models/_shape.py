"""Settings of a network's shape that several families share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.config import GeneratorConfig

TRANSFORMER_SHAPE = ("width", "depth", "heads", "caption_depth", "num_styles")


def check_heads(config: GeneratorConfig, section: str) -> None:
    """Raises RecipeError for a width that the attention heads cannot share."""
    if config.width % config.heads:
        raise RecipeError(
            f"{section}.width={config.width} must be a multiple of {section}.heads={config.heads}"
        )
