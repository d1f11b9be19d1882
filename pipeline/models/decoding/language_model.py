"""Language models continued one token at a time: what a decoder is, and the reference one.

    decoder = TransformersDecoder(lm, head, dtype)  # of one batch
    logits = decoder.prefill(inputs, mask)          # prompts (R, P, D) -> the next tokens' (R, V)
    logits = decoder.step(inputs)                   # one token per row (R, D) -> (R, V)
    decoder.keep(rows)                              # the other rows end

`TransformersDecoder` is transformers' own forward pass and key-value cache, for any architecture.
llama.py and cuda_graph.py have faster ones for Llamas; backend.py decides between them.

Shapes: R rows, P tokens of a prompt, T tokens of a row, D model width, V codebook size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache


class Decoder(Protocol):
    """Rows of a batch that a language model continues; new rows follow the old ones.

    `joinable` says whether rows can be added after the first step.
    """

    joinable: bool

    def prefill(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Add rows and read their prompts.

        Args:
            inputs: embedded prompts, float (R, P, D); P is the same for all rows of a decoder.
            mask: bool (R, P), padding on the left.

        Returns:
            logits of the token that follows each prompt, float (R, V).
        """

    def step(self, inputs: Tensor) -> Tensor:
        """Continue every row by one embedded token, float (R, D) -> logits float (R, V)."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, int64, in their order."""


def positions_of(mask: Tensor) -> Tensor:
    """bool (R, T), padding on the left -> int64 (R, T), 0 at the first token that counts."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


class TransformersDecoder:
    """The reference: a Hugging Face model's forward pass with the cache that it brings.

    Args:
        lm: the model without its head.
        head: from its states to logits.
        dtype: of the products; bfloat16 computes in mixed precision, as training does.
    """

    joinable = False

    def __init__(self, lm: PreTrainedModel, head: nn.Linear, dtype: torch.dtype) -> None:
        self.lm, self.head, self.dtype = lm, head, dtype
        self.cache = DynamicCache(config=lm.config)
        self.mask = torch.zeros(0, 0, dtype=torch.bool)  # (R, T)

    def prefill(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """See Decoder; the first step closes the batch."""
        self.mask = mask
        return self._continue(inputs, positions_of(mask))

    def step(self, inputs: Tensor) -> Tensor:
        """See Decoder."""
        self.mask = F.pad(self.mask, (0, 1), value=True)
        return self._continue(inputs[:, None], positions_of(self.mask)[:, -1:])

    def keep(self, rows: Tensor) -> None:
        """See Decoder."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def _continue(self, inputs: Tensor, positions: Tensor) -> Tensor:
        mixed = torch.autocast(inputs.device.type, self.dtype) if self._is_mixed else nullcontext()
        with mixed:
            states = self.lm(
                inputs_embeds=inputs, attention_mask=self.mask.long(), position_ids=positions,
                past_key_values=self.cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            logits: Tensor = self.head(states[:, -1])
        return logits.float()

    @property
    def _is_mixed(self) -> bool:
        return self.dtype != torch.float32
