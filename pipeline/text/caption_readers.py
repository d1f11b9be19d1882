"""Caption readers: what generators and trainings read captions with.

    CaptionReader        states of the caption encoder that do not depend on other captions
    KnownCaptions        a caption encoder's states of a few captions, without the encoder
    HFCaptionTokenizer   token ids, for families that are language models themselves

To a generator an empty caption stands for none: it draws without a caption, as guidance needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.contracts import CaptionEncoder, CaptionTokenizer, PromptTokens

REMEMBERED = 2_048
"""Captions whose states a CaptionReader keeps."""
REMEMBERED_CHARS = 1_000
"""Of a caption that is kept: longer ones are rare and would fill the memory."""


def count_prompt(reads: CaptionEncoder | CaptionTokenizer, prompt: str) -> PromptTokens:
    """How many tokens of a prompt are read by what reads captions."""
    given = reads.count_tokens(prompt)
    return PromptTokens(min(given, reads.max_tokens), given)


class CaptionReader:
    """Encodes one caption at a time, padded to the encoder's max_tokens, and caches the latest.
    An empty caption stands for none: its mask is all False.

    Encoding captions as a batch pads them to the longest one, which changes the last bits of the
    states, and those change the image: a request's image would depend on the requests beside it.
    One call of the encoder per caption costs little beside the image's decoding steps.
    """

    def __init__(self, encoder: CaptionEncoder) -> None:
        self.encoder = encoder
        self._encode = partial(_encode, encoder)
        self._remembered = lru_cache(maxsize=REMEMBERED)(self._encode)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> states float32 (B, max_tokens, width) and mask bool (B, max_tokens)."""
        states, masks = zip(*(self._read(caption) for caption in captions), strict=True)
        return torch.stack(states), torch.stack(masks)

    def _read(self, caption: str) -> tuple[Tensor, Tensor]:
        read = self._remembered if len(caption) <= REMEMBERED_CHARS else self._encode
        return read(caption)


def _encode(encoder: CaptionEncoder, caption: str) -> tuple[Tensor, Tensor]:
    states, mask = encoder.encode([caption])
    mask = mask & bool(caption)
    missing = encoder.max_tokens - states.shape[1]
    return F.pad(states[0], (0, 0, 0, missing)), F.pad(mask[0], (0, missing))


@dataclass(frozen=True)
class KnownCaptions:
    """A `contracts.CaptionEncoder` that knows a few captions only, encoded before by a real one.

    A training worker that draws samples of fixed prompts is sent one of these (it pickles) instead
    of loading a language model.

    Attributes:
        width: channels of a state.
        max_tokens: the most tokens of a caption.
        read: by caption its states float32 (1, L, width) and mask bool (1, L).
    """

    width: int
    max_tokens: int
    read: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, encoder: CaptionEncoder, captions: Sequence[str]) -> KnownCaptions:
        """Encode captions for later, each on its own."""
        read = {caption: encoder.encode([caption]) for caption in captions}
        return cls(encoder.width, encoder.max_tokens, read)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B known captions -> states float32 (B, L, width) and mask bool (B, L), L the longest's.

        Raises:
            KeyError: a caption that `of` was not given.
        """
        found = [self.read[caption] for caption in captions]
        missing = [max(m.shape[1] for _, m in found) - mask.shape[1] for _, mask in found]
        padded = [
            (F.pad(states, (0, 0, 0, more)), F.pad(mask, (0, more)))
            for (states, mask), more in zip(found, missing, strict=True)
        ]
        states, masks = zip(*padded, strict=True)
        return torch.cat(states), torch.cat(masks)

    def count_tokens(self, caption: str) -> int:
        """Tokens of a known caption, as far as it was read."""
        return int(self.read[caption][1].sum())


class HFCaptionTokenizer:
    """Captions as token ids of a language model, padded on the left to one length. An empty caption
    stands for none: its mask is all False.

    Args:
        source: a directory or hub id with a tokenizer; None stands for UTF-8 bytes, which need no
            vocabulary and cover every language.
        max_tokens: longer captions are cut.
    """

    def __init__(self, source: str | None, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer: Any
        if source is None:
            from transformers import ByT5Tokenizer

            as_bytes: Any = ByT5Tokenizer()
            self._tokenizer = partial(as_bytes, add_special_tokens=False)
        else:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(source)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> ids int64 (B, max_tokens) and mask bool (B, max_tokens)."""
        ids = torch.zeros(len(captions), self.max_tokens, dtype=torch.long)
        mask = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            found = self._ids(caption)[: self.max_tokens] if caption else []
            ids[row, self.max_tokens - len(found) :] = torch.tensor(found, dtype=torch.long)
            mask[row, self.max_tokens - len(found) :] = True
        return ids, mask

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption before it is cut."""
        return len(self._ids(caption))

    def _ids(self, caption: str) -> list[int]:
        found: list[int] = self._tokenizer(caption, verbose=False)["input_ids"]
        return found
