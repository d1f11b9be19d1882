"""A batch of images under way: what parallel and sequential decoding share.

Every image has its own random numbers and counts its own steps, so images may join a batch, end or
be dropped while the others go on, and none depends on its neighbours. A row is an image's number
in the batch, in the order in which they joined.

Shapes: B images, N image tokens, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pipeline.contracts import ImageTokenizer
from pipeline.models.decoding import sampling
from pipeline.models.decoding.canvas import (
    EncodedCanvas,
    decode_tokens,
    empty_canvas,
    encode_canvas,
)
from pipeline.models.decoding.requests import ResolvedRequest
from pipeline.runtime import autocast


@dataclass(eq=False)
class DecodingState:
    """One image under way.

    Attributes:
        request: what was asked for, its number of steps included.
        canvas: what was known at first.
        rng: the image's own, on the CPU.
        tokens: int64 (N,), meaningless where nothing is decoded yet.
        steps_done: of request.num_steps.
        dropped: nobody waits for it any more.
    """

    request: ResolvedRequest
    canvas: EncodedCanvas
    rng: torch.Generator
    tokens: Tensor
    steps_done: int = 0
    dropped: bool = False

    @property
    def active(self) -> bool:
        """Whether there are steps to do."""
        return self.steps_done < self.request.num_steps and not self.dropped

    @property
    def next_progress(self) -> float:
        """The share of the steps that is done after the next one, in (0, 1]."""
        return (self.steps_done + 1) / self.request.num_steps


def initial_states(
    requests: Sequence[ResolvedRequest], tokenizer: ImageTokenizer, device: torch.device
) -> list[DecodingState]:
    """Every request before its first step, its canvas encoded."""
    with autocast(device):
        return [_initial_state(request, tokenizer, device) for request in requests]


def _initial_state(
    request: ResolvedRequest, tokenizer: ImageTokenizer, device: torch.device
) -> DecodingState:
    rng = sampling.seeded_rng(request.seed)
    if request.canvas is None:
        canvas = empty_canvas(tokenizer, device)
    else:
        canvas = encode_canvas(request.canvas, tokenizer, rng, device)
    return DecodingState(request, canvas, rng, tokens=canvas.tokens.clone())


State = TypeVar("State", bound=DecodingState)


class DecodingBatch(Generic[State]):
    """The bookkeeping of a contracts.ContinuousBatch, for subclasses that add `join` and `step`.

    Args:
        tokenizer: decodes image tokens.
        device: where the states' tensors are.
    """

    def __init__(self, tokenizer: ImageTokenizer, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        self._states: dict[int, State] = {}  # by row; forgotten rows are not in it
        self._num_joined = 0

    def _add(self, states: Sequence[State]) -> range:
        """Give new states their rows."""
        rows = range(self._num_joined, self._num_joined + len(states))
        self._states |= dict(zip(rows, states, strict=True))
        self._num_joined += len(states)
        return rows

    def progress(self, row: int) -> tuple[int, int]:
        """See contracts.GenerationBatch."""
        return self._states[row].steps_done, self._states[row].request.num_steps

    def drop(self, rows: Sequence[int]) -> None:
        """See contracts.GenerationBatch."""
        for row in rows:
            self._states[row].dropped = True

    def forget(self, rows: Sequence[int]) -> None:
        """See contracts.ContinuousBatch."""
        self.drop(rows)
        for row in rows:
            del self._states[row]

    def tokens(self, rows: Sequence[int]) -> Tensor:
        """Their image tokens as they stand, int64 (len(rows), N)."""
        return torch.stack([self._states[row].tokens for row in rows])

    @torch.inference_mode()
    def images(self, rows: Sequence[int]) -> Tensor:
        """See contracts.GenerationBatch; pixels outside a canvas's mask are the canvas's own."""
        decoded = decode_tokens(self._tokenizer, self.tokens(rows), self._device)
        canvases = [self._states[row].canvas for row in rows]
        kept = torch.stack([canvas.pixels for canvas in canvases])
        inpainted = torch.stack([canvas.inpainted for canvas in canvases])
        return torch.where(inpainted, decoded, kept).cpu()
