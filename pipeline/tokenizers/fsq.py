"""Finite scalar quantisation (FSQ): each dimension of a latent rounds to one of a few levels.

There is no codebook to learn, so none can collapse. A token's index is a number whose digits are
the levels of its dimensions.

Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple" (arXiv 2309.15505),
section 3; the bound and the index arithmetic follow its equations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.config.section import Config
from pipeline.config.tokenizer import TokenizerConfig
from pipeline.contracts import TokenizerKind
from pipeline.tokenizers._autoencoder import CONVOLUTIONAL_SHAPE, QuantizedAutoencoder


class FSQ(nn.Module):
    """Rounds each of D bounded dimensions to one of levels[d] values; `_autoencoder.Quantizer`."""

    counts: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels, self.width = tuple(levels), len(levels)
        self.register_buffer("counts", torch.tensor(levels), persistent=False)
        basis = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))])
        self.register_buffer("basis", basis, persistent=False)
        self.codebook_size = math.prod(levels)

    def bound(self, latents: Tensor) -> Tensor:
        """float (..., D) -> (..., D), bounded so that levels[d] integers lie within dimension d."""
        half = (self.counts - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.counts % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(latents + shift) * half - offset

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """float (..., D) -> codes (..., D) in [-1, 1] and no loss: 0.

        Gradients pass straight through the rounding.
        """
        bounded = self.bound(latents.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.counts // 2), latents.new_zeros(())

    def to_indices(self, codes: Tensor) -> Tensor:
        """codes (..., D) -> int64 (...,) in [0, codebook_size)."""
        digits = (codes * (self.counts // 2)).round() + self.counts // 2
        return (digits.long() * self.basis).sum(-1)

    def to_codes(self, indices: Tensor) -> Tensor:
        """int64 (...,) -> codes float (..., D)."""
        half = self.counts // 2
        return (self.digits(indices) - half) / half

    def digits(self, indices: Tensor) -> Tensor:
        """int64 (...,) -> the level of each dimension, int64 (..., D)."""
        return indices.unsqueeze(-1) // self.basis % self.counts


class FSQTokenizer(TokenizerKind):
    """See `contracts.TokenizerKind`."""

    options = Config  # its settings stand in the section `tokenizer` itself
    shape_fields = ("levels", *CONVOLUTIONAL_SHAPE)
    unread: Mapping[str, str] = dict.fromkeys(
        ("codebook_size", "code_width", "commitment_weight", "entropy_weight"),
        "on the tokenizer fsq, whose levels make up its codebook",
    )

    def build(self, config: TokenizerConfig, image_size: int) -> QuantizedAutoencoder:
        """A freshly initialised network."""
        return QuantizedAutoencoder(config, image_size, FSQ(config.levels))


TOKENIZER = FSQTokenizer()
