"""Reading captions so that a caption's states never depend on the captions beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from pipeline.contracts import CaptionEncoder

REMEMBERED = 2_048


class CaptionReader:
    """Encodes one caption at a time, padded to the encoder's max_tokens, and remembers the latest.
    An empty one stands for none: its mask is all False.

    Batched encoding pads to the longest neighbour, which moves the last bits of the states: enough
    for another picture. An encoder call a caption is little beside drawing one.
    """

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.encoder = encoder
        self._read = lru_cache(maxsize=REMEMBERED)(partial(_encode, encoder))

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> states (B, max_tokens, width) and mask bool (B, max_tokens)."""
        states, masks = zip(*(self._read(caption) for caption in captions), strict=True)
        return torch.stack(states), torch.stack(masks)


def _encode(encoder: CaptionEncoder, caption: str) -> tuple[Tensor, Tensor]:
    states, mask = encoder.encode([caption])
    mask = mask & bool(caption)
    missing = encoder.max_tokens - states.shape[1]
    return F.pad(states[0], (0, 0, 0, missing)), F.pad(mask[0], (0, missing))


@dataclass(frozen=True)
class KnownCaptions:
    """contracts.CaptionEncoder of a few captions that were read elsewhere, for who would otherwise
    load a language model for them."""

    width: int
    max_tokens: int
    read: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, encoder: CaptionEncoder, captions: Sequence[str]) -> KnownCaptions:
        read = {caption: encoder.encode([caption]) for caption in captions}
        return cls(encoder.width, encoder.max_tokens, read)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See contracts.CaptionEncoder; KeyError for one that was not read."""
        found = [self.read[caption] for caption in captions]
        missing = [max(m.shape[1] for _, m in found) - mask.shape[1] for _, mask in found]
        padded = [
            (F.pad(states, (0, 0, 0, more)), F.pad(mask, (0, more)))
            for (states, mask), more in zip(found, missing, strict=True)
        ]
        states, masks = zip(*padded, strict=True)
        return torch.cat(states), torch.cat(masks)


class HFCaptionTokenizer:
    """Captions as a language model's own token ids, padded on the left to one length. An empty one
    stands for none: its mask is all False.

    Args:
        source: a directory or hub id with a tokenizer; None stands for UTF-8 bytes, which need no
            vocabulary and know every language.
        max_tokens: longer captions are cut.
    """

    def __init__(self, source: str | None, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(source) if source else None
        self._bytes = transformers.ByT5Tokenizer()

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> ids int64 (B, max_tokens) and mask bool (B, max_tokens)."""
        ids = torch.zeros(len(captions), self.max_tokens, dtype=torch.long)
        mask = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            found = self._read(caption)[: self.max_tokens] if caption else []
            ids[row, self.max_tokens - len(found) :] = torch.tensor(found, dtype=torch.long)
            mask[row, self.max_tokens - len(found) :] = True
        return ids, mask

    def _read(self, caption: str) -> list[int]:
        if self._tokenizer is None:
            read: list[int] = self._bytes(caption, add_special_tokens=False)["input_ids"]
        else:
            read = self._tokenizer(caption)["input_ids"]
        return read
