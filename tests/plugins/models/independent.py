"""A family in one file, as a plugin: every image token is drawn by itself, from the caption alone.

    TESSERA_PLUGINS=$PWD/tests/plugins tessera retrain smoke generator.family=independent

Shapes: B images, N image tokens, V codebook, C caption width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import GeneratorConfig
from pipeline.config.section import Config
from pipeline.contracts import Family, GenerationRequest, ModelParts, ModelSpec, OnStep
from pipeline.images.pixels import to_uint8
from pipeline.models.decoding import sampling
from pipeline.models.decoding.requests import resolve_requests
from pipeline.objective import GeneratorNetwork, Objective
from pipeline.runtime import autocast
from pipeline.text.caption_encoder import masked_mean
from pipeline.text.caption_readers import CaptionReader


class IndependentConfig(Config):
    """The recipe's section `generator.independent`."""

    hidden: int = Field(32, ge=1, description="width of the one hidden layer")


class IndependentNetwork(GeneratorNetwork):
    """Caption and style -> logits of every image token."""

    def __init__(self, config: GeneratorConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.no_style = spec, config.num_styles
        hidden = config.options(IndependentConfig).hidden
        self.read = nn.Linear(spec.caption_width, hidden)
        self.style = nn.Embedding(config.num_styles + 1, hidden)
        self.to_logits = nn.Linear(hidden, spec.num_tokens * spec.codebook_size)

    def style_rows(self) -> Tensor:
        return self.style.weight

    def head_modules(self) -> Sequence[nn.Module]:
        return [self.to_logits]

    def text_modules(self) -> Sequence[nn.Module]:
        return [self.read]

    def forward(self, states: Tensor, mask: Tensor, style: Tensor) -> Tensor:
        """(B, L, C), bool (B, L), int64 (B,) -> (B, N, V)."""
        hidden = F.gelu(self.read(masked_mean(states.float(), mask)) + self.style(style))
        logits: Tensor = self.to_logits(hidden).float()
        return logits.view(len(style), self.spec.num_tokens, self.spec.codebook_size)


class IndependentObjective(Objective):
    """Cross-entropy over all image tokens that the task does not give."""

    phases = ("predict",)
    model: IndependentNetwork

    def __init__(self, model: IndependentNetwork, config: GeneratorConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        mask, style = batch["caption_mask"], batch["style"]
        if self.training:
            mask, style = sampling.drop_conditions(
                mask, style, config=self.config, no_style=self.model.no_style
            )
        logits = self.model(batch["caption_states"], mask, style)
        target = batch["image_tokens"]
        if "source_given" in batch:
            target = target.masked_fill(batch["source_given"], -100)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), target.flatten())}


class IndependentGenerator:
    """contracts.ImageGenerator in one pass."""

    tasks = frozenset({"text_to_image"})

    def __init__(
        self,
        model: IndependentNetwork,
        config: GeneratorConfig,
        spec: ModelSpec,
        parts: ModelParts,
    ) -> None:
        self.model = model.to(parts.device).eval()
        self.config, self.spec, self.parts = config, spec, parts
        self.styles, self.image_size = spec.styles, spec.image_size
        self.read_captions = CaptionReader(parts.encoder)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        resolved = resolve_requests(
            requests, self.config, self.styles, fixed_steps=1, guidance_scale=1.0
        )
        styles = [r.style_id for r in resolved]
        states, mask = self.read_captions([r.prompt for r in resolved])
        device = self.parts.device
        with autocast(device):
            logits = self.model(*(x.to(device) for x in (states, mask, torch.tensor(styles)))).cpu()
            tokens = [
                torch.multinomial(row.softmax(-1), 1, generator=sampling.seeded_rng(r.seed))[:, 0]
                for row, r in zip(logits, resolved, strict=True)
            ]
            drawn = self.parts.tokenizer.decode(torch.stack(tokens).to(device))
        return to_uint8(drawn).cpu()


class Independent(Family):
    """See `contracts.Family`."""

    options = IndependentConfig
    reads_source = True
    shape_fields = ("num_styles", "independent.hidden")

    def unread(self, config: GeneratorConfig) -> Mapping[str, str]:
        unread = ("width", "depth", "heads", "caption_depth", "dropout", "num_steps")
        return dict.fromkeys(unread, "on the family independent")

    def build(self, config: GeneratorConfig, spec: ModelSpec) -> IndependentNetwork:
        return IndependentNetwork(config, spec)

    def objective(self, model: IndependentNetwork, config: GeneratorConfig) -> Objective:
        return IndependentObjective(model, config)

    def generator(
        self,
        model: IndependentNetwork,
        config: GeneratorConfig,
        spec: ModelSpec,
        parts: ModelParts,
    ) -> IndependentGenerator:
        return IndependentGenerator(model, config, spec, parts)


FAMILY = Independent()
