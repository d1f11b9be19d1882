"""Pictures under way, each a row of its own: what parallel and sequential decoding share.

Every picture follows its own noise and counts its own steps, so that pictures may join, end or be
dropped while others go on.

Shapes: N image tokens, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pipeline.contracts import ImageTokenizer
from pipeline.models._canvas import Start, decoded
from pipeline.models._requests import Settings


@dataclass(eq=False)
class Picture:
    """One of them.

    Attributes:
        tokens: int64 (N,).
        hidden: bool (N,), what is to be drawn; the other tokens are given.
        pixels: uint8 (3, S, S), kept where `redrawn`, bool (1, S, S), is False.
        noise: its own.
        scale: of guidance.
        steps: in all, of which `done` are over.
    """

    tokens: Tensor
    hidden: Tensor
    pixels: Tensor
    redrawn: Tensor
    noise: torch.Generator
    scale: float
    temperature: float
    steps: int
    done: int = 0
    dropped: bool = False

    @property
    def under_way(self) -> bool:
        return self.done < self.steps and not self.dropped


def pictures_of(
    start: Start, settings: Settings, noise: Sequence[torch.Generator]
) -> list[Picture]:
    """What B requests begin with."""
    return [
        Picture(
            start.tokens[i], start.hidden[i], start.pixels[i], start.redrawn[i], noise[i],
            settings.guidance_scales[i], settings.temperatures[i], settings.num_steps[i],
        )
        for i in range(len(noise))
    ]  # fmt: skip


P = TypeVar("P", bound=Picture)


class Rows(Generic[P]):
    """The bookkeeping of a contracts.ContinuousBatch; `step` and `join` are its heirs'.

    Args:
        tokenizer: decodes image tokens.
        device: where they are.
    """

    def __init__(self, tokenizer: ImageTokenizer, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        self._pictures: dict[int, P] = {}  # by row, but the forgotten ones
        self._joined = 0

    def _enter(self, pictures: Sequence[P]) -> range:
        """Their rows."""
        rows = range(self._joined, self._joined + len(pictures))
        self._pictures |= dict(zip(rows, pictures, strict=True))
        self._joined += len(pictures)
        return rows

    def progress(self, row: int) -> tuple[int, int]:
        return self._pictures[row].done, self._pictures[row].steps

    def drop(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._pictures[row].dropped = True

    def forget(self, rows: Sequence[int]) -> None:
        self.drop(rows)
        for row in rows:
            del self._pictures[row]

    def tokens(self, rows: Sequence[int]) -> Tensor:
        """int64 (len(rows), N)."""
        return torch.stack([self._pictures[row].tokens for row in rows])

    @torch.inference_mode()
    def images(self, rows: Sequence[int]) -> Tensor:
        found = [self._pictures[row] for row in rows]
        drawn = decoded(self._tokenizer, self.tokens(rows), self._device)
        kept = torch.stack([picture.pixels for picture in found])
        redrawn = torch.stack([picture.redrawn for picture in found])
        return torch.where(redrawn, drawn, kept).cpu()
