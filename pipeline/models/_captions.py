"""Reading captions so that a caption's states never depend on the captions beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.contracts import CaptionEncoder

REMEMBERED = 2_048


class CaptionReader:
    """Encodes one caption at a time, padded to the encoder's max_tokens, and remembers the latest.

    Batched encoding pads to the longest neighbour, which moves the last bits of the states: enough
    for another picture. An encoder call a caption is little beside drawing one.
    """

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.encoder = encoder
        self._read = lru_cache(maxsize=REMEMBERED)(self._encode)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> states (B, max_tokens, width) and mask bool (B, max_tokens)."""
        states, masks = zip(*(self._read(caption) for caption in captions), strict=True)
        return torch.stack(states), torch.stack(masks)

    def _encode(self, caption: str) -> tuple[Tensor, Tensor]:
        states, mask = self.encoder.encode([caption])
        missing = self.encoder.max_tokens - states.shape[1]
        return F.pad(states[0], (0, 0, 0, missing)), F.pad(mask[0], (0, missing))
