"""The causal family (GPT type): a language model continues the caption with image tokens.

Any pretrained `AutoModelForCausalLM`, or a small Llama over UTF-8 bytes from scratch, grows a table
and a head for image tokens (networks/causal.py). The result can be exported as an ordinary Hugging
Face model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.config.section import Config
from pipeline.contracts import CaptionTokenizer, Family, ImageGenerator, ModelParts, ModelSpec
from pipeline.models._shape import TRANSFORMER_SHAPE, check_heads

if TYPE_CHECKING:
    from pipeline.config import GeneratorConfig
    from pipeline.models.networks.causal import CausalTransformer
    from pipeline.objective import Objective

_UNREAD = ("caption_depth", "rectangle_fraction", "num_steps")
_PRETRAINED_SHAPE = ("width", "depth", "heads")


class CausalConfig(Config):
    """The section `generator.causal`."""

    language_model: str | None = Field(
        None,
        description="hub id, directory, .gguf file or package:NAME of a pretrained causal language "
        "model; None: a small Llama of the generator's width, depth and heads over UTF-8 bytes",
    )
    max_prompt_tokens: int = Field(48, ge=1, description="longer captions are cut")
    token_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest share of an image's earlier tokens withheld in training, drawn for "
        "each image: what cannot be told from them has to be read in the caption",
    )
    top_k: int = Field(0, ge=0, description="likeliest image tokens to draw from; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="probability of those to draw from; 1: all")


class Causal(Family):
    """See `contracts.Family`."""

    options = CausalConfig
    reads_source = True
    shape_fields = (*TRANSFORMER_SHAPE, "causal.language_model")
    unsearchable: Mapping[str, str] = {
        "causal.top_k": "it does not change the validation loss",
        "causal.top_p": "it does not change the validation loss",
    }
    exports = True

    def unread(self, config: GeneratorConfig) -> Mapping[str, str]:
        """Also the shape, which a pretrained language model has of its own."""
        unread = dict.fromkeys(_UNREAD, "on the family causal")
        if language_model := self.language_model(config):
            reason = f"because the shape is that of {language_model}"
            unread |= dict.fromkeys(_PRETRAINED_SHAPE, reason)
        return unread

    def check(self, config: GeneratorConfig, section: str) -> None:
        """Refuse a width that the attention heads of a new network cannot share."""
        if self.language_model(config) is None:
            check_heads(config, section)

    def language_model(self, config: GeneratorConfig) -> str | None:
        """The setting of that name."""
        return config.options(CausalConfig).language_model

    def language_model_config(
        self, config: GeneratorConfig, source: str | None
    ) -> Mapping[str, Any]:
        """The pretrained model's Hugging Face config, or that of a small Llama over bytes."""
        from pipeline.models.networks.causal import language_model_config

        return language_model_config(config, source)

    def caption_tokenizer(self, config: GeneratorConfig, source: str | None) -> CaptionTokenizer:
        """The language model's own tokens; UTF-8 bytes without one."""
        from pipeline.text.caption_readers import HFCaptionTokenizer

        return HFCaptionTokenizer(source, config.options(CausalConfig).max_prompt_tokens)

    def build(self, config: GeneratorConfig, spec: ModelSpec) -> CausalTransformer:
        """A freshly initialised network."""
        from pipeline.models.networks.causal import CausalTransformer

        return CausalTransformer(config, spec)

    def objective(self, model: CausalTransformer, config: GeneratorConfig) -> Objective:
        """Cross-entropy over the image's tokens."""
        from pipeline.models.networks.causal import CausalObjective

        return CausalObjective(model, config)

    def generator(
        self,
        model: CausalTransformer,
        config: GeneratorConfig,
        spec: ModelSpec,
        parts: ModelParts,
    ) -> ImageGenerator:
        """Token by token with a key-value cache and classifier-free guidance."""
        from pipeline.models.networks.causal import CausalGenerator

        return CausalGenerator(model, config, spec, parts)

    def export(self, model: CausalTransformer, directory: Path) -> None:
        """Write an ordinary Hugging Face model."""
        from pipeline.models.networks.causal import export

        export(model, directory)


FAMILY = Causal()
