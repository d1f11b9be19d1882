"""Which implementation decodes: the plain one or an optimised one. It is decided here alone.

    TESSERA_DECODING=auto       the optimised one where there is one (the default)
    TESSERA_DECODING=reference  the plain one everywhere

masked  reference: the network's own forward pass
        optimised: packed_masked.py, on CPUs, without adapters
causal  reference: transformers' forward pass and cache, language_model.TransformersDecoder
        optimised: llama.py, on GPUs cuda_graph.py, for Llamas without adapters
gan     the network's own forward pass, which is all there is to do

Both compute the same: in float32 the same tokens, in bfloat16 the same but for rounding, which the
tests compare for every family. The reference is there to be read, to be compared with and to rule
the optimised code out when an image looks wrong. It is slower, a causal batch cannot be joined, and
the last bits of an image may depend on the images beside it, which `auto` excludes on CPUs.

The setting is the process's own, read when a generator decodes its first image. Processes of a
local Ray inherit it; on a cluster set it where its containers get their environment.
"""

from __future__ import annotations

import os
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.models.decoding.cuda_graph import GraphBatch, GraphDecoder
from pipeline.models.decoding.language_model import Decoder, TransformersDecoder
from pipeline.models.decoding.llama import LlamaWeights, SlotDecoder
from pipeline.models.decoding.packed_masked import packed_predictor
from pipeline.models.decoding.parallel import TokenPredictor
from pipeline.runtime import autocast, autocast_dtype

if TYPE_CHECKING:
    from pipeline.models.networks.masked import MaskedTransformer

VARIABLE = "TESSERA_DECODING"

Backend = Literal["auto", "reference"]


def chosen_backend() -> Backend:
    """The setting of this process.

    Raises:
        RecipeError: it is set to something else; the message lists what there is.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in get_args(Backend):
        raise RecipeError(f"{VARIABLE}={value!r} is not one of: {', '.join(get_args(Backend))}")
    return cast("Backend", value)


def token_predictor(
    model: MaskedTransformer, device: torch.device, max_caption_tokens: int
) -> TokenPredictor:
    """The masked family's network with the weights that it has now.

    Args:
        model: on the device.
        device: where it computes.
        max_caption_tokens: to which all captions are padded.
    """
    with autocast(device):
        table = model.table()
    if chosen_backend() == "reference" or device.type != "cpu" or has_adapters(model):
        return TokenPredictor(partial(model, table=table), partial(model.logits, table=table))
    dtype = autocast_dtype(device) or torch.float32
    return packed_predictor(model, table, dtype, max_caption_tokens)


class DecoderFactory:
    """Decoders of one language model, with the weights that it has when the first one is made.

    Args:
        lm: the model without its head.
        head: from its states to logits.
        dtype: of the products; what the device is fast in, unless given.
    """

    def __init__(
        self, lm: PreTrainedModel, head: nn.Linear, dtype: torch.dtype | None = None
    ) -> None:
        self.lm, self.head = lm, head
        self.dtype = dtype or autocast_dtype(head.weight.device) or torch.float32
        self._idle: dict[int, list[GraphBatch]] = {}  # by number of slots

    def __call__(self, num_slots: int) -> Decoder:
        """A decoder of rows whose prompt and tokens are at most `num_slots` together."""
        if self._weights is None:
            return TransformersDecoder(self.lm, self.head, self.dtype)
        if self._weights.device.type == "cuda":
            return GraphDecoder(self._weights, num_slots, self._idle.setdefault(num_slots, []))
        return SlotDecoder(self._weights, num_slots)

    @cached_property
    def _weights(self) -> LlamaWeights | None:
        """None where only the reference will do."""
        if chosen_backend() == "reference" or has_adapters(self.lm):
            return None
        if not LlamaWeights.supports(self.lm):
            return None
        return LlamaWeights(self.lm, self.head, self.dtype)


def has_adapters(model: nn.Module) -> bool:
    """Whether layers carry LoRA's adapters (peft), which their weights alone do not know of."""
    return any(hasattr(module, "base_layer") for module in model.modules())
