"""Language models one token at a time: the layers of a Llama over fixed slots of keys and values,
or any other model through its own cache.

    decoder = Decoder(...)             # of one batch
    logits = decoder.add(inputs, keys) # prompts (R, P, D) -> what comes after them (R, V)
    logits = decoder.step(inputs)      # one token more of every row (R, D) -> (R, V)
    decoder.keep(rows)                 # the other rows end

Slots make a row independent of where its neighbours are: rows may join and leave between steps. All
prompts have one length P; a row's tokens then follow in its own slots.

Shapes: R rows, T slots a row, D model width, H heads, K key heads, E width of a head, V codebook.
"""

from __future__ import annotations

from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

from pipeline.models._packed import Picturewise, Rowwise, has_adapters, with_modules
from pipeline.runtime import autocast, autocast_dtype

Layer = dict[str, Rowwise]
"""What shares an input, joined."""


class Decoder(Protocol):
    """Rows of a batch being continued; new rows follow the old ones.

    `joinable` says whether rows can be added after the first step.
    """

    joinable: bool

    def add(self, inputs: Tensor, keys: Tensor) -> Tensor:
        """Prompts (R, P, D), keys bool (R, P) with padding on the left -> logits float (R, V)."""

    def step(self, inputs: Tensor) -> Tensor:
        """One embedded token a row, (R, D) -> logits float (R, V)."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, int64, in their order."""


def positions_of(keys: Tensor) -> Tensor:
    """bool (R, T), padding on the left -> int64 (R, T), 0 at the first token that counts."""
    return (keys.long().cumsum(1) - 1).clamp_min(0)


class CacheDecoder:
    """Any Hugging Face language model with the cache that it brings."""

    joinable = False

    def __init__(self, lm: PreTrainedModel, head: nn.Linear) -> None:
        self.lm, self.head = lm, head
        self.cache = DynamicCache(config=lm.config)
        self.keys = torch.zeros(0, 0, dtype=torch.bool)

    def add(self, inputs: Tensor, keys: Tensor) -> Tensor:
        self.keys = keys
        return self._continue(inputs, positions_of(keys))

    def step(self, inputs: Tensor) -> Tensor:
        self.keys = F.pad(self.keys, (0, 1), value=True)
        return self._continue(inputs[:, None], positions_of(self.keys)[:, -1:])

    def keep(self, rows: Tensor) -> None:
        self.keys = self.keys[rows]
        self.cache.batch_select_indices(rows)

    def _continue(self, inputs: Tensor, positions: Tensor) -> Tensor:
        with autocast(inputs.device):
            states = self.lm(
                inputs_embeds=inputs, attention_mask=self.keys.long(), position_ids=positions,
                past_key_values=self.cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            logits: Tensor = self.head(states[:, -1])
        return logits.float()


class LlamaWeights:
    """A Llama's weights as decoding wants them: joined where they share an input, and cast once.

    Args:
        lm: a `LlamaModel`; later changes to it are not seen.
        head: from its states to logits.
        dtype: of the products; norms, residuals and softmax stay float32.
    """

    def __init__(self, lm: LlamaModel, head: nn.Linear, dtype: torch.dtype) -> None:
        config = lm.config
        self.lm, self.dtype, self.device = lm, dtype, head.weight.device
        self.eps = config.rms_norm_eps
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_width = lm.layers[0].self_attn.head_dim
        halves = torch.arange(self.head_width, device=self.device).view(2, -1)
        self.pairs = halves.t().flatten()  # what rotates together, side by side
        heads = torch.arange(self.heads + self.key_heads, device=self.device)[:, None]
        turned = (heads * self.head_width + self.pairs).flatten()
        self.layers = [
            {
                "qkv": self._joined(
                    layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
                    scale=layer.input_layernorm.weight, order=turned,
                ),
                "out": self._joined(layer.self_attn.o_proj),
                "up": self._joined(
                    layer.mlp.gate_proj, layer.mlp.up_proj,
                    scale=layer.post_attention_layernorm.weight,
                ),
                "down": self._joined(layer.mlp.down_proj),
            }
            for layer in lm.layers
        ]  # fmt: skip
        self.reader = lru_cache(1)(partial(_reader, lm, dtype, self.device))
        self.head = self._joined(head)
        self.last = self._joined(head, scale=lm.norm.weight)

    @staticmethod
    def fit(lm: PreTrainedModel) -> bool:
        """Whether this is an architecture that is written out here, and without adapters."""
        known = type(lm) is LlamaModel and lm.config.hidden_act == "silu"
        return known and not has_adapters(lm)

    def _joined(
        self, *layers: nn.Linear, scale: Tensor | None = None, order: Tensor | None = None
    ) -> Rowwise:
        """Layers of one input below each other; `scale` is that of the norm before them.

        `order` names the rows that come first.
        """
        weight = torch.cat([layer.weight for layer in layers]).detach()
        weight = weight if scale is None else weight * scale.detach()
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases).detach() if biases else None
        if order is not None:
            rows = torch.cat([order, torch.arange(len(order), len(weight), device=order.device)])
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return Rowwise(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))


def _reader(lm: LlamaModel, dtype: torch.dtype, device: torch.device, length: int) -> LlamaModel:
    """What reads prompts of this length: the model, on a CPU with products of whole prompts."""
    if device.type != "cpu":
        return lm

    def own(module: nn.Module) -> nn.Module:
        linear = {n: layer for n, layer in module.named_children() if isinstance(layer, nn.Linear)}
        products = {n: Picturewise(linear[n], dtype, length, pack=False) for n in linear}
        return with_modules(module, **products)

    layers = [
        with_modules(layer, self_attn=own(layer.self_attn), mlp=own(layer.mlp))
        for layer in lm.layers
    ]
    return with_modules(lm, layers=nn.ModuleList(layers))


class SlotDecoder:
    """A Llama with `length` slots of keys and values a row.

    Source: Touvron et al. 2023, LLaMA (arXiv 2302.13971): pre-normalisation, rotary positions,
    SwiGLU; Ainslie et al. 2023 (arXiv 2305.13245): grouped-query attention.
    """

    joinable = True

    def __init__(self, weights: LlamaWeights, length: int) -> None:
        self.weights = w = weights
        device = w.device
        shape = (len(w.layers), 0, w.key_heads, length, w.head_width)
        self.k = torch.zeros(shape, dtype=w.dtype, device=device)
        self.v = torch.zeros(shape, dtype=w.dtype, device=device)
        self.seen = torch.zeros(0, length, dtype=torch.bool, device=device)
        self.end = torch.zeros(0, dtype=torch.long, device=device)  # slots used, by row
        everywhere = torch.arange(length, device=device)[None]
        one = torch.zeros(1, 1, w.lm.config.hidden_size, device=device)
        cos, sin = w.lm.rotary_emb(one, position_ids=everywhere)  # both halves of E are the same
        self.turns = torch.complex(cos, sin)[0, :, None, : w.head_width // 2]  # (T, 1, E / 2)

    def add(self, inputs: Tensor, keys: Tensor) -> Tensor:
        """The prompts go through the model itself; their keys and values move into slots."""
        w, rows, length = self.weights, len(inputs), inputs.shape[1]
        cache = DynamicCache(config=w.lm.config)
        with autocast(inputs.device):
            states = w.reader(length)(
                inputs_embeds=inputs, attention_mask=keys.long(), position_ids=positions_of(keys),
                past_key_values=cache, use_cache=True,
            ).last_hidden_state[:, -1]  # fmt: skip
        room = (0, 0, 0, self.k.shape[3] - length)
        k, v = (
            F.pad(torch.stack([getattr(layer, name) for layer in cache.layers]).to(w.dtype), room)
            for name in ("keys", "values")
        )
        self.k, self.v = torch.cat([self.k, k[..., w.pairs]], 1), torch.cat([self.v, v], 1)
        self.seen = torch.cat([self.seen, F.pad(keys, (0, room[3]))])
        self.end = torch.cat([self.end, self.end.new_full((rows,), length)])
        return w.head(states.to(w.dtype)).float()

    def step(self, inputs: Tensor) -> Tensor:
        w, rows, ends = self.weights, torch.arange(len(inputs), device=inputs.device), self.end
        self.seen[rows, ends] = True
        turn = self.turns[self.seen.sum(1) - 1]
        hidden = torch.zeros(self.seen.shape, dtype=w.dtype, device=inputs.device)
        hidden.masked_fill_(~self.seen, -torch.inf)
        hidden = hidden.repeat_interleave(w.key_heads, 0)[:, None]  # (R * K, 1, T)
        at: tuple[slice | Tensor, ...] = (rows, slice(None), ends)
        if len(rows) and bool((ends == ends[0]).all()):  # the same slot for all: no scattering
            at = (slice(None), slice(None), int(ends[0]))
        x = inputs.float()
        for k, v, layer in zip(self.k, self.v, w.layers, strict=True):
            x = x + self._attend(x, k, v, layer, turn, at, hidden)
            gate, up = layer["up"](self._normed(x)).chunk(2, -1)
            x = x + layer["down"](F.silu(gate) * up)
        self.end = ends + 1
        return w.last(self._normed(x)).float()

    def keep(self, rows: Tensor) -> None:
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.seen, self.end = self.seen[rows], self.end[rows]

    def _attend(
        self, x: Tensor, k: Tensor, v: Tensor, layer: Layer, turn: Tensor, at: Any, hidden: Tensor
    ) -> Tensor:
        """(R, D) over all slots of its row -> (R, D); writes k and v (R, K, T, E) where `at`."""
        w, R = self.weights, len(x)
        qkv = layer["qkv"](self._normed(x)).view(R, -1, w.head_width)
        turned = _turned(qkv[:, : w.heads + w.key_heads], turn).to(w.dtype)
        k[at], v[at] = turned[:, w.heads :], qkv[:, w.heads + w.key_heads :]
        q = turned[:, : w.heads].reshape(R * w.key_heads, -1, w.head_width)  # a group's heads
        keys = k.view(R * w.key_heads, -1, w.head_width).transpose(1, 2)
        scores = torch.baddbmm(hidden, q, keys, alpha=w.head_width**-0.5)
        mixed = scores.softmax(-1) @ v.view(R * w.key_heads, -1, w.head_width)
        return layer["out"](mixed.view(R, -1))

    def _normed(self, x: Tensor) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) without its scale, which is in the
        weights that follow. F.rms_norm takes twice as many operations on CPUs."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        # an operation each: joined ones round otherwise where a row stands at an array's end
        ratio = square.mul_(1 / x.shape[-1]).add_(self.weights.eps).rsqrt_()
        return (x * ratio).to(self.weights.dtype)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """float (R, H, E), pairs side by side, turned by its position: complex (R, 1, E / 2).

    Source: Su et al. 2021, RoFormer, arXiv 2104.09864, eq. 13.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


class DecoderMaker:
    """Decoders of one language model, the fastest kind that knows it."""

    def __init__(self, lm: PreTrainedModel, head: nn.Linear) -> None:
        self.lm, self.head = lm, head

    @cached_property
    def _weights(self) -> LlamaWeights | None:
        dtype = autocast_dtype(self.head.weight.device) or torch.float32
        return LlamaWeights(self.lm, self.head, dtype) if LlamaWeights.fit(self.lm) else None

    def __call__(self, length: int) -> Decoder:
        """For prompts and tokens of `length` together."""
        if self._weights is None:
            return CacheDecoder(self.lm, self.head)
        return SlotDecoder(self._weights, length)
