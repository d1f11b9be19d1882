"""Language models one token at a time: the layers of a Llama over fixed slots of keys and values,
or any other model through its own cache.

    decoder = Decoder(...)             # of one batch
    logits = decoder.add(inputs, keys) # prompts (R, P, D) -> what comes after them (R, V)
    logits = decoder.step(inputs)      # one token more of every row (R, D) -> (R, V)
    decoder.keep(rows)                 # the other rows end

Slots make a row independent of where its neighbours are: rows may join and leave between steps. All
prompts have one length P; a row's tokens then follow in its own slots. On GPUs, where starting the
hundreds of small kernels of a step takes longer than running them, a step is one CUDA graph.

Shapes: R rows, T slots a row, D model width, H heads, K key heads, E width of a head, V codebook.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

from pipeline.models._packed import Rowwise, has_adapters
from pipeline.runtime import autocast, autocast_dtype

_CAPTURING = threading.Lock()  # PyTorch captures one graph at a time
ROOMS_KEPT = 4  # of a length, when nobody draws
ROOMY = 4  # times the places wanted is not too large

Layer = dict[str, Rowwise]
"""What shares an input, joined."""

Slots = slice | tuple[Tensor, Tensor]
"""The same of every row, or a slot of its own for every row: both int64 (R,)."""


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
        pairs = halves.t().flatten()  # what rotates together, side by side
        heads = torch.arange(self.heads + self.key_heads, device=self.device)[:, None]
        turned = (heads * self.head_width + pairs).flatten()
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


class SlotDecoder:
    """A Llama with `length` slots of keys and values a row.

    Source: Touvron et al. 2023, LLaMA (arXiv 2302.13971): pre-normalisation, rotary positions,
    SwiGLU; Ainslie et al. 2023 (arXiv 2305.13245): grouped-query attention.
    """

    joinable = True

    def __init__(self, weights: LlamaWeights, length: int) -> None:
        self.weights = w = weights
        device = w.device
        shape = (len(w.layers), 2, 0, w.key_heads, length, w.head_width)
        self.kv = torch.zeros(shape, dtype=w.dtype, device=device)  # keys, then values
        self.seen = torch.zeros(0, length, dtype=torch.bool, device=device)
        self.end = torch.zeros(0, dtype=torch.long, device=device)  # slots used, by row
        everywhere = torch.arange(length, device=device)[None]
        one = torch.zeros(1, 1, w.lm.config.hidden_size, device=device)
        cos, sin = w.lm.rotary_emb(one, position_ids=everywhere)  # both halves of E are the same
        turns = torch.complex(cos, sin)[0, :, None, : w.head_width // 2]  # (T, 1, E / 2)
        turned = turns.expand(-1, w.heads + w.key_heads, -1)
        self.turns = torch.cat([turned, torch.ones_like(turns).expand(-1, w.key_heads, -1)], 1)

    def add(self, inputs: Tensor, keys: Tensor) -> Tensor:
        logits, kv, seen, end = self.read(inputs, keys)
        self.kv = torch.cat([self.kv, kv], 2)
        self.seen = torch.cat([self.seen, seen])
        self.end = torch.cat([self.end, end])
        return logits

    def read(self, inputs: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `add` returns, and the new rows' kv, seen and end, which are not kept."""
        w, (R, P, _) = self.weights, inputs.shape
        fresh = self.kv.new_zeros(*self.kv.shape[:2], R, *self.kv.shape[3:])
        # padding sees itself, or it would see nothing and spoil what comes after
        sees = torch.ones(P, P, dtype=torch.bool, device=inputs.device).tril()
        sees = (sees & keys[:, None]) | torch.eye(P, dtype=torch.bool, device=inputs.device)
        groups = w.heads // w.key_heads
        hidden = self._hidden(sees).repeat(1, groups, 1)  # of a key head's queries
        states = self._layers(
            inputs, fresh[..., :P, :], self.turns[positions_of(keys)].flatten(0, 1),
            hidden.repeat_interleave(w.key_heads, 0), slice(P),
        )  # fmt: skip
        unused = self.seen.shape[1] - P
        logits = w.last(self._normed(states.view(R, P, -1)[:, -1])).float()
        return logits, fresh, F.pad(keys, (0, unused)), self.end.new_full((R,), P)

    def step(self, inputs: Tensor) -> Tensor:
        w, ends = self.weights, self.end
        rows = torch.arange(len(inputs), device=inputs.device)
        self.seen.scatter_(1, ends[:, None], True)  # assigning would wait for the GPU
        hidden = self._hidden(self.seen[:, None]).repeat_interleave(w.key_heads, 0)
        states = self._layers(
            inputs[:, None], self.kv, self.turns[self.seen.sum(1) - 1], hidden, self._slots(rows)
        )
        self.end += 1
        return w.last(self._normed(states)).float()

    def _slots(self, rows: Tensor) -> Slots:
        """Where the next tokens go; to ask a GPU whether that is the same for all would take longer
        than scattering them."""
        ends = self.end
        if ends.device.type == "cpu" and len(rows) and bool((ends == ends[0]).all()):
            return slice(int(ends[0]), int(ends[0]) + 1)
        return rows, ends

    def keep(self, rows: Tensor) -> None:
        self.kv, self.seen, self.end = self.kv[:, :, rows], self.seen[rows], self.end[rows]

    def _hidden(self, sees: Tensor) -> Tensor:
        """bool -> what to add to scores."""
        hidden = torch.zeros(sees.shape, dtype=self.weights.dtype, device=sees.device)
        return hidden.masked_fill_(~sees, -torch.inf)

    def _layers(
        self, inputs: Tensor, kv: Tensor, turn: Tensor, hidden: Tensor, slots: Slots
    ) -> Tensor:
        """Through all layers.

        Args:
            inputs: (R, T, D), new tokens.
            kv: (layers, 2, R, K, S, E), where theirs are written and all are read.
            turn: complex (R T, H + 2 K, E / 2), by position.
            hidden: (R K, 1 or (H / K) T, S), -inf where a query does not look.
            slots: those of the new tokens.

        Returns:
            float (R T, D).
        """
        x = inputs.flatten(0, 1).float()
        for cache, layer in zip(kv, self.weights.layers, strict=True):
            x = x + self._attend(x, cache, layer, turn, hidden, slots)
            gate, up = layer["up"](self._normed(x)).chunk(2, -1)
            x = x + layer["down"](F.silu(gate) * up)
        return x

    def _attend(
        self, x: Tensor, kv: Tensor, layer: Layer, turn: Tensor, hidden: Tensor,
        slots: Slots,
    ) -> Tensor:  # fmt: skip
        """(R T, D) over all slots of its row -> (R T, D)."""
        w = self.weights
        R, H, K, E = kv.shape[1], w.heads, w.key_heads, w.head_width
        qkv = _turned(layer["qkv"](self._normed(x)), turn).to(w.dtype).view(R, -1, H + 2 * K, E)
        new = qkv[:, :, H:].unflatten(2, (2, K))  # (R, T, 2, K, E)
        if isinstance(slots, slice):
            kv[..., slots, :] = new.permute(2, 0, 3, 1, 4)
        else:
            rows, ends = slots
            kv[:, rows, :, ends] = new[:, 0]
        k, v = kv.flatten(1, 2)  # (R K, S, E)
        # a key head's queries below each other, (R K, (H / K) T, E)
        q = qkv[:, :, :H].unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4).reshape(len(k), -1, E)
        scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=E**-0.5)
        mixed = torch.bmm(scores.softmax(-1), v).view(R, H, -1, E)
        return layer["out"](mixed.transpose(1, 2).reshape(len(x), -1))

    def _normed(self, x: Tensor) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) without its scale, which is in the
        weights that follow. F.rms_norm takes twice as many operations on CPUs."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        # an operation each: joined ones round otherwise where a row stands at an array's end
        ratio = square.mul_(1 / x.shape[-1]).add_(self.weights.eps).rsqrt_()
        return (x * ratio).to(self.weights.dtype)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """(M, heads E), pairs side by side, turned by complex (M, heads, E / 2).

    Returns:
        float (M, heads, E / 2, 2).

    Source: Su et al. 2021, RoFormer, arXiv 2104.09864, eq. 13.
    """
    pairs = torch.view_as_complex(x.float().view(*turn.shape, 2))
    return torch.view_as_real(pairs * turn)


class Room:
    """A number of places for rows on a GPU. A CUDA graph computes a step of all, taken or free; it
    knows memory by its address, so nothing here is ever replaced.

    Args:
        weights: on a GPU.
        length: slots a row.
        places: how many.
    """

    def __init__(self, weights: LlamaWeights, length: int, places: int) -> None:
        self.slots = slots = SlotDecoder(weights, length)
        layers, both, _, *row = slots.kv.shape
        slots.kv = slots.kv.new_zeros(layers, both, places, *row)
        slots.seen = slots.seen.new_zeros(places, length)
        slots.end = slots.end.new_zeros(places)
        width = weights.lm.config.hidden_size
        self.inputs = torch.zeros(places, width, device=weights.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.zeros(0)

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """kv, seen and end of the rows in places int64 (R,)."""
        slots = self.slots
        return slots.kv[:, :, places], slots.seen[places], slots.end[places]

    def put(self, places: Tensor, kv: Tensor, seen: Tensor, end: Tensor) -> None:
        """Rows into places int64 (R,), whatever was there."""
        slots = self.slots
        slots.kv[:, :, places], slots.seen[places], slots.end[places] = kv, seen, end

    def step(self, places: Tensor, inputs: Tensor) -> Tensor:
        """See Decoder.step, of the rows in `places`."""
        self.inputs[places] = inputs.float()
        if self.graph is None:
            self.graph = self._captured()
        self.graph.replay()
        return self.logits[places]

    def _advance(self) -> Tensor:
        logits = self.slots.step(self.inputs)
        last = self.slots.seen.shape[1] - 1
        self.slots.end.clamp_(max=last)  # free places would go on past it
        return logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        slots, graph = self.slots, torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.device(self.inputs.device):
            seen, end = slots.seen.clone(), slots.end.clone()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._advance()  # libraries want memory at their first call, graphs allow none
            torch.cuda.current_stream().wait_stream(aside)
            slots.seen.copy_(seen)
            slots.end.copy_(end)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._advance()
        return graph


class GraphDecoder:
    """SlotDecoder's rows in places of a `Room`; one too small is left for one twice as large.

    A room that is too large is kept until no row is left in it.

    Args:
        weights: on a GPU.
        length: slots a row.
        rooms: of this length, left by decoders that ended; they are used again.
    """

    joinable = True

    def __init__(self, weights: LlamaWeights, length: int, rooms: list[Room]) -> None:
        self.weights, self.length, self.rooms = weights, length, rooms
        self.reader = SlotDecoder(weights, length)
        self.room: Room | None = None
        self.places = torch.zeros(0, dtype=torch.long, device=weights.device)  # by row

    def add(self, inputs: Tensor, keys: Tensor) -> Tensor:
        logits, *rows = self.reader.read(inputs, keys)
        room, places = self._with_space(len(inputs))
        free = torch.ones(len(room), dtype=torch.bool, device=places.device)
        free[places] = False
        fresh = free.nonzero()[: len(inputs), 0]
        room.put(fresh, *rows)
        # nothing can fail any more, for want of memory, say, and leave other rows half moved
        old, self.room, self.places = self.room, room, torch.cat([places, fresh])
        if old is not None and old is not room:
            self._leave(old)
        return logits

    def step(self, inputs: Tensor) -> Tensor:
        assert self.room is not None, "prompts come first"
        return self.room.step(self.places, inputs)

    def keep(self, rows: Tensor) -> None:
        self.places = self.places[rows]
        if self.room is not None and not len(self.places):
            self._leave(self.room)
            self.room = None

    def _with_space(self, joining: int) -> tuple[Room, Tensor]:
        """This room or a larger one, with the rows that are here, and their places."""
        old, wanted = self.room, len(self.places) + joining
        if old is None:
            return self._found(wanted), self.places
        if wanted <= len(old):
            return old, self.places
        room = self._found(max(wanted, 2 * len(old)))
        places = torch.arange(len(self.places), device=self.places.device)
        room.put(places, *old.rows(self.places))
        return room, places

    def _found(self, places: int) -> Room:
        fitting = [room for room in self.rooms if places <= len(room) <= ROOMY * places]
        if not fitting:
            return Room(self.weights, self.length, places)
        room = min(fitting, key=len)
        self.rooms.remove(room)
        return room

    def _leave(self, room: Room) -> None:
        self.rooms.append(room)
        del self.rooms[:-ROOMS_KEPT]


class DecoderMaker:
    """Decoders of one language model, the fastest kind that knows it.

    Args:
        lm: the model.
        head: from its states to logits.
        dtype: of the products; what the device is fast in, unless given.
    """

    def __init__(
        self, lm: PreTrainedModel, head: nn.Linear, dtype: torch.dtype | None = None
    ) -> None:
        self.lm, self.head = lm, head
        self.dtype = dtype or autocast_dtype(head.weight.device) or torch.float32
        self._rooms: dict[int, list[Room]] = {}  # by length

    @cached_property
    def _weights(self) -> LlamaWeights | None:
        return LlamaWeights(self.lm, self.head, self.dtype) if LlamaWeights.fit(self.lm) else None

    def __call__(self, length: int) -> Decoder:
        """For prompts and tokens of `length` together."""
        if self._weights is None:
            return CacheDecoder(self.lm, self.head)
        if self._weights.device.type == "cuda":
            return GraphDecoder(self._weights, length, self._rooms.setdefault(length, []))
        return SlotDecoder(self._weights, length)
