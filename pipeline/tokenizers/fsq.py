"""Convolutional autoencoder with finite scalar quantisation: nothing can collapse.

Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple" (arXiv 2309.15505),
section 3; the bound and the index arithmetic follow its equations. Work starts at the patch grid
(16x16 for 64-pixel pictures), because convolutions at full resolution are ruinous on CPUs.

Shapes: B pictures, H = W = image_size, P = H / patch, G = H / downsample, N = G * G tokens,
D = len(levels) code dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import TokenizerConfig


class FSQ(nn.Module):
    """Rounds each of D bounded dimensions to one of levels[d] values."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))])
        self.register_buffer("basis", basis, persistent=False)
        self.codebook_size = math.prod(levels)

    def bound(self, latents: Tensor) -> Tensor:
        """(..., D) -> (..., D) with levels[d] integers inside the range of dimension d."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(latents + shift) * half - offset

    def forward(self, latents: Tensor) -> Tensor:
        """float (..., D) -> codes (..., D) in [-1, 1], rounded with a straight-through gradient."""
        bounded = self.bound(latents.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2)

    def to_indices(self, codes: Tensor) -> Tensor:
        """codes (..., D) -> int64 (...,) in [0, codebook_size)."""
        digits = (codes * (self.levels // 2)).round() + self.levels // 2
        return (digits.long() * self.basis).sum(-1)

    def to_codes(self, indices: Tensor) -> Tensor:
        """int64 (...,) -> codes float (..., D)."""
        half = self.levels // 2
        return (self.digits(indices) - half) / half

    def digits(self, indices: Tensor) -> Tensor:
        """int64 (...,) -> the level of each dimension, int64 (..., D)."""
        return indices.unsqueeze(-1) // self.basis % self.levels


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W): on CPUs several times faster than GroupNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3; the last one starts at zero: identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Self-attention over the token grid, so that a token may depend on the whole picture."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, H * W, C)
        qkv = self.qkv(self.norm(tokens)).view(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.out(mixed).transpose(1, 2).view(B, C, H, W)


def _stack(width: int, depth: int, *, attention: bool = False) -> nn.Sequential:
    blocks: list[nn.Module] = [ResidualBlock(width) for _ in range(depth)]
    if attention:
        blocks.insert(max(1, depth // 2), AttentionBlock(width))
    return nn.Sequential(*blocks)


class FSQAutoencoder(nn.Module):
    """contracts.ImageTokenizer with an FSQ bottleneck."""

    def __init__(self, config: TokenizerConfig, image_size: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.grid_size = image_size // config.downsample
        self.quantizer = FSQ(config.levels)
        self.codebook_size = self.quantizer.codebook_size
        fine, coarse = config.widths
        near, deep = config.encoder_depths
        near_out, deep_out = config.decoder_depths
        patch, stride, D = config.patch, config.downsample // config.patch, len(config.levels)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, fine, patch, stride=patch),
            *_stack(fine, near),
            nn.Conv2d(fine, coarse, stride, stride=stride),
            *_stack(coarse, deep, attention=True),
            ChannelNorm(coarse),
            nn.Conv2d(coarse, D, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(D, coarse, 3, padding=1),
            *_stack(coarse, deep_out, attention=True),
            nn.ConvTranspose2d(coarse, fine, stride, stride=stride),
            *_stack(fine, near_out),
            ChannelNorm(fine),
            nn.Conv2d(fine, 3 * patch * patch, 3, padding=1),
            nn.PixelShuffle(patch),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float (B, 3, H, W) in [-1, 1] -> (reconstruction (B, 3, H, W), quantiser loss ())."""
        codes = self._codes(images)
        return self._decode_codes(codes), images.new_zeros(())

    def encode(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [-1, 1] -> int64 (B, N)."""
        return self.quantizer.to_indices(self._codes(images)).flatten(1)

    def decode(self, image_tokens: Tensor) -> Tensor:
        """int64 (B, N) -> float (B, 3, H, W) in [-1, 1]."""
        grid = image_tokens.view(-1, self.grid_size, self.grid_size)
        return self._decode_codes(self.quantizer.to_codes(grid)).float().clamp(-1, 1)

    def _codes(self, images: Tensor) -> Tensor:
        latents = self.encoder(images.contiguous(memory_format=torch.channels_last))  # (B, D, G, G)
        return self.quantizer(latents.permute(0, 2, 3, 1))  # (B, G, G, D)

    def _decode_codes(self, codes: Tensor) -> Tensor:
        return self.decoder(codes.permute(0, 3, 1, 2))


def build(config: TokenizerConfig, image_size: int) -> FSQAutoencoder:
    """A freshly initialised tokenizer."""
    return FSQAutoencoder(config, image_size)
