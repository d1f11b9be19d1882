"""The convolutional autoencoder around a quantiser, whichever that is.

Work starts at the patch grid (16 x 16 for 64-pixel images), because convolutions at full resolution
cost most of the time on CPUs. The encoder goes on at the token grid; the decoder mirrors it.

    tokenizer = QuantizedAutoencoder(config, image_size=64, quantizer=FSQ(config.levels))

Shapes: B images, H = W = image_size, G = H / downsample, N = G * G tokens, D code dimensions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.config.tokenizer import TokenizerConfig
from pipeline.errors import RecipeError
from pipeline.objective import TokenizerNetwork
from pipeline.tokenizers._blocks import AttentionBlock, ChannelNorm, ResidualBlock

CONVOLUTIONAL_SHAPE = ("downsample", "patch", "widths", "encoder_depths", "decoder_depths")
"""`TokenizerKind.shape_fields` of the autoencoder."""


class Quantizer(Protocol):
    """Latents -> codes <-> indices; an nn.Module.

    Attributes:
        width: D, dimensions of a latent and of a code.
        codebook_size: how many codes there are.
        levels: FSQ levels of each dimension; empty for quantisers of another kind.
    """

    width: int
    codebook_size: int
    levels: tuple[int, ...]

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """float (..., D) -> codes (..., D), differentiable, and the quantiser's loss, a scalar."""

    def to_indices(self, codes: Tensor) -> Tensor:
        """codes (..., D) -> int64 (...,) in [0, codebook_size)."""

    def to_codes(self, indices: Tensor) -> Tensor:
        """int64 (...,) -> codes float (..., D)."""


def _stack(width: int, depth: int, *, attention: bool = False) -> nn.Sequential:
    blocks: list[nn.Module] = [ResidualBlock(width) for _ in range(depth)]
    if attention:
        blocks.insert(max(1, depth // 2), AttentionBlock(width))
    return nn.Sequential(*blocks)


class QuantizedAutoencoder(TokenizerNetwork):
    """Convolutions, a quantiser, and convolutions back.

    Raises:
        RecipeError: `downsample` is no multiple of `patch`.
    """

    def __init__(self, config: TokenizerConfig, image_size: int, quantizer: Quantizer) -> None:
        super().__init__()
        if config.downsample % config.patch:
            raise RecipeError(
                f"tokenizer.downsample={config.downsample} must be a multiple of "
                f"tokenizer.patch={config.patch}"
            )
        self.config = config
        self.image_size = image_size
        self.grid_size = image_size // config.downsample
        self.quantizer = quantizer
        self.codebook_size, self.levels = quantizer.codebook_size, quantizer.levels
        fine, coarse = config.widths
        near, deep = config.encoder_depths
        near_out, deep_out = config.decoder_depths
        patch, stride = config.patch, config.downsample // config.patch
        self.encoder = nn.Sequential(
            nn.Conv2d(3, fine, patch, stride=patch),
            *_stack(fine, near),
            nn.Conv2d(fine, coarse, stride, stride=stride),
            *_stack(coarse, deep, attention=True),
            ChannelNorm(coarse),
            nn.Conv2d(coarse, quantizer.width, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(quantizer.width, coarse, 3, padding=1),
            *_stack(coarse, deep_out, attention=True),
            nn.ConvTranspose2d(coarse, fine, stride, stride=stride),
            *_stack(fine, near_out),
            ChannelNorm(fine),
            nn.Conv2d(fine, 3 * patch * patch, 3, padding=1),
            nn.PixelShuffle(patch),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def head_modules(self) -> list[nn.Module]:
        """The decoder."""
        return [self.decoder]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W) and the quantiser's loss."""
        codes, loss = self._codes(images)
        return self._decode_codes(codes), loss

    def encode(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [-1, 1] -> int64 (B, N)."""
        return self.quantizer.to_indices(self._codes(images)[0]).flatten(1)

    def decode(self, image_tokens: Tensor) -> Tensor:
        """int64 (B, N) -> float (B, 3, H, W) in [-1, 1]."""
        grid = image_tokens.view(-1, self.grid_size, self.grid_size)
        return self._decode_codes(self.quantizer.to_codes(grid)).float().clamp(-1, 1)

    def _codes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encoder(images.contiguous(memory_format=torch.channels_last))  # (B, D, G, G)
        return self.quantizer(latents.permute(0, 2, 3, 1))  # (B, G, G, D)

    def _decode_codes(self, codes: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(codes.permute(0, 3, 1, 2))
        return decoded
