"""A tokenizer in one file, as a plugin: a token is the mean colour of its cell.

    TESSERA_PLUGINS=$PWD/tests/plugins tessera train smoke tokenizer.name=mean_colour

The decoder, which learns to paint a cell from its colour, is all that trains.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.section import Config
from pipeline.config.tokenizer import TokenizerConfig
from pipeline.contracts import TokenizerKind
from pipeline.objective import TokenizerNetwork


class MeanColourConfig(Config):
    """The recipe's section `tokenizer.mean_colour`."""

    bits: int = Field(3, ge=1, le=5, description="per colour channel")


class MeanColourNetwork(TokenizerNetwork):
    """Red, green and blue with `bits` bits each, for every cell of `cell` x `cell` pixels."""

    def __init__(self, bits: int, cell: int, image_size: int) -> None:
        super().__init__()
        self.image_size, self.grid_size, self.cell = image_size, image_size // cell, cell
        self.base = 2**bits
        self.codebook_size = self.base**3
        self.paint = nn.Sequential(nn.Conv2d(3, 3 * cell**2, 3, padding=1), nn.PixelShuffle(cell))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colours = self._colours(self.encode(images))
        return self.paint(colours), images.new_zeros(())

    def encode(self, images: Tensor) -> Tensor:
        mean = (F.avg_pool2d(images.float(), self.cell) + 1) / 2  # (B, 3, G, G) in [0, 1]
        digits = (mean * self.base).long().clamp(0, self.base - 1).flatten(2)
        tokens: Tensor = (digits[:, 0] * self.base + digits[:, 1]) * self.base + digits[:, 2]
        return tokens

    def decode(self, image_tokens: Tensor) -> Tensor:
        painted: Tensor = self.paint(self._colours(image_tokens))
        return painted.float().clamp(-1, 1)

    def head_modules(self) -> list[nn.Module]:
        return [self.paint]

    def _colours(self, tokens: Tensor) -> Tensor:
        """int64 (B, N) -> float (B, 3, G, G) in [-1, 1]."""
        places = (tokens // self.base**2, tokens // self.base % self.base, tokens % self.base)
        digits = torch.stack(places, 1).view(-1, 3, self.grid_size, self.grid_size)
        colours: Tensor = 2 * (digits + 0.5) / self.base - 1
        return colours


class MeanColour(TokenizerKind):
    """See `contracts.TokenizerKind`."""

    options = MeanColourConfig
    shape_fields = ("downsample", "mean_colour.bits")

    def build(self, config: TokenizerConfig, image_size: int) -> MeanColourNetwork:
        """A freshly initialised network."""
        return MeanColourNetwork(
            config.options(MeanColourConfig).bits, config.downsample, image_size
        )


TOKENIZER = MeanColour()
