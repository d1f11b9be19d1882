"""The optimised masked network on CPUs: its linear layers packed and batch-invariant.

A copy of the network shares all parameters but those of its widest layers. What it computes is the
network's own forward pass; each image's products are its own, so that its bits do not depend on the
images beside it, and GELU is part of the product before it.

Gain, the plain network's time over this one's, alone and in batches of 8, on one CPU thread in
bfloat16 (`OMP_NUM_THREADS=1 python tests/benchmarks/families.py backends`): 1.10 and 1.08 with 8
steps, 1.16 and 1.15 with 12. The greater gain is the bits: of 40 images that joined a batch on one
thread 37 were not those generated alone with the plain network, and none is with this one
(tests/benchmarks/history.md, "A picture's bits").
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from pipeline.models.decoding.packed import ImageInvariantLinear
from pipeline.models.decoding.parallel import TokenPredictor

if TYPE_CHECKING:
    from pipeline.models.networks.masked import Block, MaskedTransformer

Copied = TypeVar("Copied", bound=nn.Module)


def packed_predictor(
    model: MaskedTransformer, table: Tensor, dtype: torch.dtype, max_caption_tokens: int
) -> TokenPredictor:
    """The network with the weights that it has now.

    Args:
        model: on a CPU, without adapters.
        table: float (V, D), model.table().
        dtype: of the products.
        max_caption_tokens: L, to which all captions are padded.
    """
    N, L = model.spec.num_tokens, max_caption_tokens

    def invariant(layer: nn.Linear, rows: int, *, gelu: bool = False) -> ImageInvariantLinear:
        return ImageInvariantLinear(layer, dtype, rows, gelu=gelu)

    blocks = [
        with_modules(  # an image has two rows in a batch, with its caption and without
            block,
            qkv=invariant(block.qkv, 2 * N),
            caption_kv=invariant(block.caption_kv, 2 * L),
            out=invariant(block.out, 2 * N),
            expand=invariant(block.expand, 2 * N, gelu=True),
            activation=nn.Identity(),
            contract=invariant(block.contract, 2 * N),
        )
        for block in cast("Iterable[Block]", model.blocks)
    ]
    packed = with_modules(
        model, blocks=nn.ModuleList(blocks), to_table=invariant(model.to_table, 2 * N)
    )
    V, D = table.shape
    head = nn.Linear(D, V, device="meta")
    head.weight, head.bias = nn.Parameter(table), model.bias
    return TokenPredictor(partial(packed, table=table), invariant(head, N))


def with_modules(module: Copied, **others: nn.Module) -> Copied:
    """A copy of `module`, whose parameters it shares, with other modules of these names."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **others}
    return copied
