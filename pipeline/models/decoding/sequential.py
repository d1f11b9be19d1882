"""Sequential decoding: one image token per step, images of different ages side by side.

LlamaGen (Sun et al. 2024, arXiv 2406.06525): next-token prediction with classifier-free
guidance, temperature, top-k and top-p. An image takes one or two rows of the language model: one
with its caption and, where it is guided, one without.

Shapes: B new images, A active images, R rows of the language model, P tokens of a prompt, N image
tokens, D width of the model, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.contracts import GenerationRequest, ImageTokenizer
from pipeline.models.decoding import sampling
from pipeline.models.decoding.language_model import Decoder
from pipeline.models.decoding.rows import DecodingBatch, DecodingState

WHITE = 1.0  # a pixel of images in [-1, 1]


@dataclass
class Prompts:
    """What B new images begin with.

    Attributes:
        states: B of them.
        inputs: embedded prompts, float (2 B, P, D): B with captions, then the same B without them
            or with their negative prompts.
        mask: bool (2 B, P), padding on the left.
    """

    states: list[DecodingState]
    inputs: Tensor
    mask: Tensor


class _Row(NamedTuple):
    """A row of the language model."""

    state: DecodingState
    conditional: bool


class SequentialDecoding(DecodingBatch[DecodingState]):
    """contracts.ContinuousBatch of a causal model; images join only if the decoder lets them.

    Args:
        decoder: the language model's.
        begin: makes prompts of requests; raises RequestError.
        embed: sampled tokens int64 (R,) -> the decoder's next inputs (R, D).
        tokenizer: decodes image tokens.
        truncate: logits (A, V) -> the same, -inf where a token may not be sampled.
        device: where to compute.
        guidance_schedule: see sampling.guidance_scale_at.
    """

    def __init__(
        self,
        decoder: Decoder,
        begin: Callable[[Sequence[GenerationRequest]], Prompts],
        embed: Callable[[Tensor], Tensor],
        tokenizer: ImageTokenizer,
        truncate: Callable[[Tensor], Tensor],
        device: torch.device,
        guidance_schedule: str,
    ) -> None:
        super().__init__(tokenizer, device)
        self._decoder, self._begin, self._embed = decoder, begin, embed
        self._truncate, self._guidance_schedule = truncate, guidance_schedule
        self._rows: list[_Row] = []  # in the decoder's order
        self._logits = torch.zeros(0)  # (R, V), of the next token

    @property
    def joinable(self) -> bool:
        """See contracts.ContinuousBatch."""
        return self._decoder.joinable

    @torch.inference_mode()
    def join(self, requests: Sequence[GenerationRequest]) -> range:
        """See contracts.ContinuousBatch."""
        prompts = self._begin(requests)
        states, B = prompts.states, len(requests)
        guided = [i for i, state in enumerate(states) if state.request.guidance_scale != 1]
        wanted = [*range(B), *(B + i for i in guided)]
        logits = self._decoder.prefill(prompts.inputs[wanted], prompts.mask[wanted])
        self._logits = torch.cat([self._logits, logits]) if self._rows else logits
        self._rows += [_Row(state, True) for state in states]
        self._rows += [_Row(states[i], False) for i in guided]
        return self._add(states)

    @torch.inference_mode()
    def step(self) -> bool:
        """See contracts.GenerationBatch."""
        self._keep([i for i, row in enumerate(self._rows) if not row.state.dropped])
        if not self._rows:
            return False
        states = [row.state for row in self._rows if row.conditional]
        tokens = self._next_tokens(states)
        for state, token in zip(states, tokens, strict=True):
            state.tokens[state.steps_done] = token
            state.steps_done += 1
        position = {id(state): i for i, state in enumerate(states)}
        self._keep([i for i, row in enumerate(self._rows) if row.state.active])
        if self._rows:
            inputs = tokens[[position[id(row.state)] for row in self._rows]]
            self._logits = self._decoder.step(self._embed(inputs))
        return True

    def _keep(self, rows: list[int]) -> None:
        """Go on with these rows of the decoder alone."""
        if len(rows) == len(self._rows):
            return
        index = torch.tensor(rows, dtype=torch.long, device=self._logits.device)
        self._rows = [self._rows[i] for i in rows]
        self._logits = self._logits[index]
        self._decoder.keep(index)

    def _next_tokens(self, states: list[DecodingState]) -> Tensor:
        """The next token of every active image, int64 (A,): the canvas's own where it is given."""
        logits, device = self._guided_logits(states), self._logits.device
        temperature = torch.tensor([state.request.temperature for state in states], device=device)
        greedy = temperature < sampling.GREEDY
        logits = self._truncate(logits / temperature.masked_fill(greedy, 1)[:, None])
        uniform = sampling.uniform_noise([1] * len(states), [state.rng for state in states])
        sampled = sampling.categorical(logits, (~greedy).float(), uniform.to(device))
        given = torch.stack([state.tokens[state.steps_done] for state in states])
        hidden = torch.stack([state.canvas.hidden[state.steps_done] for state in states])
        return torch.where(hidden, sampled, given)

    def _guided_logits(self, states: list[DecodingState]) -> Tensor:
        """float (A, V)."""
        device = self._logits.device
        conditional = [i for i, row in enumerate(self._rows) if row.conditional]
        # an image's last row: the one without its caption, or its only one
        last = {id(row.state): i for i, row in enumerate(self._rows)}
        unconditional = [last[id(state)] for state in states]
        progress = torch.tensor([state.next_progress for state in states], device=device)
        scale = torch.tensor([state.request.guidance_scale for state in states], device=device)
        scale = sampling.guidance_scale_at(scale, progress, self._guidance_schedule)
        return sampling.classifier_free_guidance(
            self._logits[conditional], self._logits[unconditional], scale
        )

    @torch.inference_mode()
    def tokens(self, rows: Sequence[int]) -> Tensor:
        """int64 (len(rows), N); where nothing is decoded yet, a white image's."""
        tokens, states = super().tokens(rows), [self._states[row] for row in rows]
        if all(state.steps_done == state.request.num_steps for state in states):
            return tokens
        size = self._tokenizer.image_size
        white = torch.full((1, 3, size, size), WHITE, device=tokens.device)
        done = torch.tensor([[state.steps_done] for state in states], device=tokens.device)
        decoded = torch.arange(tokens.shape[1], device=tokens.device) < done
        given = ~torch.stack([state.canvas.hidden for state in states])
        return torch.where(decoded | given, tokens, self._tokenizer.encode(white))
