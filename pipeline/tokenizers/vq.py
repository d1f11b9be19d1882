"""Vector quantisation (VQ) by cosine similarity, with an entropy loss that keeps codes in use.

Sources:
    few dimensions, latents and codes of unit length: Yu et al. 2022, "Vector-quantized Image
        Modeling with Improved VQGAN" (arXiv 2110.04627), section 3.1
    codebook and commitment losses: van den Oord et al. 2017, VQ-VAE (arXiv 1711.00937), equation 3
    entropy loss, for latents that are sure of their code and codes that are used alike: Yu et al.
        2024, MAGVIT-v2 (arXiv 2310.05737), equation 5

The entropy loss is differentiable, so no worker of a distributed training has to revive dead codes
on its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.section import Config
from pipeline.config.tokenizer import TokenizerConfig
from pipeline.contracts import TokenizerKind
from pipeline.tokenizers._autoencoder import CONVOLUTIONAL_SHAPE, QuantizedAutoencoder

ENTROPY_SHARPNESS = 20.0  # cosines times this are the logits of the soft assignment
ENTROPY_LATENTS = 512  # latents of a batch that the entropies are estimated from


class CosineVQ(nn.Module):
    """The nearest of codebook_size learned unit vectors; `_autoencoder.Quantizer`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.codebook_size, self.width = config.codebook_size, config.code_width
        self.levels: tuple[int, ...] = ()
        self.commitment_weight = config.commitment_weight
        self.entropy_weight = config.entropy_weight
        self.codebook = nn.Embedding(self.codebook_size, self.width)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """float (..., D) -> unit codes (..., D), straight-through, and the loss, a scalar."""
        latents = F.normalize(latents.float(), dim=-1)
        codes = self.to_codes(self.to_indices(latents))
        loss = (codes - latents.detach()).square().mean()
        loss = loss + self.commitment_weight * (latents - codes.detach()).square().mean()
        if self.training and self.entropy_weight:
            loss = loss + self.entropy_weight * self._entropy_loss(latents.flatten(0, -2))
        return latents + (codes - latents).detach(), loss

    def _entropy_loss(self, latents: Tensor) -> Tensor:
        """Mean entropy of the soft assignments minus the entropy of their mean, in nats."""
        some = latents[torch.randperm(len(latents), device=latents.device)[:ENTROPY_LATENTS]]
        log_p = (ENTROPY_SHARPNESS * some @ self.unit_codes().T).log_softmax(-1)
        each = -(log_p.exp() * log_p).sum(-1).mean()
        mean = log_p.exp().mean(0)
        return each + (mean * mean.clamp_min(1e-9).log()).sum()

    def to_indices(self, codes: Tensor) -> Tensor:
        """float (..., D) -> int64 (...,): the codes of the largest cosine."""
        with torch.autocast(codes.device.type, enabled=False):
            return (codes.float() @ self.unit_codes().T).argmax(-1)

    def to_codes(self, indices: Tensor) -> Tensor:
        """int64 (...,) -> float (..., D)."""
        return F.embedding(indices, self.unit_codes())

    def unit_codes(self) -> Tensor:
        """The codebook, l2-normalised float32 (codebook_size, D)."""
        return F.normalize(self.codebook.weight.float(), dim=-1)


class VQTokenizer(TokenizerKind):
    """See `contracts.TokenizerKind`."""

    options = Config  # its settings stand in the section `tokenizer` itself
    shape_fields = ("codebook_size", "code_width", *CONVOLUTIONAL_SHAPE)
    unread: Mapping[str, str] = {"levels": "on the tokenizer vq"}

    def build(self, config: TokenizerConfig, image_size: int) -> QuantizedAutoencoder:
        """A freshly initialised network."""
        return QuantizedAutoencoder(config, image_size, CosineVQ(config))


TOKENIZER = VQTokenizer()
