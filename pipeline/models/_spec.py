"""What a generator must know of the tokenizer, the captions and the styles it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.contracts import CaptionEncoder, ImageTokenizer
from pipeline.models._captions import CaptionTokenizer


@dataclass(frozen=True)
class ModelSpec:
    """Sizes a network is built by; part of a bundle's config.json.

    Attributes:
        image_size: pixels a side.
        codebook_size: values of an image token.
        num_tokens: tokens a picture, N.
        levels: FSQ levels of a token's dimensions, empty for other tokenizers.
        caption_width: width of the caption encoder's states.
        styles: names by style id; at most GeneratorConfig.num_styles.
        language_model: its Hugging Face config, for families that are built around one.
    """

    image_size: int
    codebook_size: int
    num_tokens: int
    levels: tuple[int, ...]
    caption_width: int
    styles: tuple[str, ...]
    language_model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelParts:
    """What a generator needs beside its network; caption_ids for families that read ids."""

    tokenizer: ImageTokenizer
    encoder: CaptionEncoder
    device: torch.device
    caption_ids: CaptionTokenizer | None = None


def level_digits(spec: ModelSpec) -> Tensor | None:
    """The FSQ level of each dimension of each token, int64 (codebook_size, D), or None."""
    if not spec.levels:
        return None
    from pipeline.tokenizers.fsq import FSQ

    return FSQ(spec.levels).digits(torch.arange(spec.codebook_size))
