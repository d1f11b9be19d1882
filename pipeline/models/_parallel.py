"""Parallel decoding, one step at a time: hidden image tokens are guessed, the surest guesses stay.

MaskGIT (Chang et al. 2022, arXiv 2202.04200), sec. 3.2. Every row follows its own schedule and its
own noise, so rows may end, or be dropped, while the others go on.

Shapes: B pictures, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.contracts import ImageTokenizer
from pipeline.images import to_uint8
from pipeline.models import _sampling as sampling
from pipeline.models._canvas import lay_out
from pipeline.models._requests import Settings
from pipeline.runtime import autocast

Guess = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows int64 (R,), tokens (R, N), hidden bool (R, N)) -> logits with and without the caption."""


class ParallelDrawing:
    """contracts.Drawing.

    Args:
        guess: the network's opinion of some rows.
        tokenizer: decodes the rows, and encodes their canvases.
        settings: of the B rows.
        num_tokens: N.
        device: where to compute.
        guidance_schedule: see sampling.guidance_at.
    """

    @torch.inference_mode()
    def __init__(
        self,
        guess: Guess,
        tokenizer: ImageTokenizer,
        settings: Settings,
        num_tokens: int,
        device: torch.device,
        guidance_schedule: str,
    ) -> None:
        self._guidance_schedule = guidance_schedule
        self._guess, self._tokenizer, self._device = guess, tokenizer, device
        self._noise = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
        self._scale = torch.tensor(settings.guidance_scales, device=device)
        self._temperature = torch.tensor(settings.temperatures, device=device)
        self._steps = torch.tensor(settings.num_steps, device=device)
        self._done = torch.zeros_like(self._steps)
        self._dropped = torch.zeros_like(self._steps, dtype=torch.bool)
        with autocast(device):
            self._start = lay_out(settings.canvases, tokenizer, num_tokens, self._noise, device)
        self._tokens, self._known = self._start.tokens, ~self._start.hidden

    def progress(self, row: int) -> tuple[int, int]:
        return int(self._done[row]), int(self._steps[row])

    @torch.inference_mode()
    def drop(self, rows: Sequence[int]) -> None:
        self._dropped[list(rows)] = True

    @torch.inference_mode()
    def step(self) -> bool:
        rows = ((self._done < self._steps) & ~self._dropped).nonzero()[:, 0]
        if not len(rows):
            return False
        with autocast(self._device):
            tokens, known = self._advance(rows)
        self._tokens[rows], self._known[rows] = tokens, known
        self._done[rows] += 1
        return True

    def _advance(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 (R, N) and which of them are known after one more step of these rows."""
        tokens, known = self._tokens[rows], self._known[rows]
        progress = (self._done[rows] + 1) / self._steps[rows]
        temperature = self._temperature[rows]
        conditional, unconditional = self._guess(rows, tokens, ~known)
        scale = sampling.guidance_at(self._scale[rows], progress, self._guidance_schedule)
        logits = sampling.classifier_free_guidance(conditional, unconditional, scale)
        shape = (logits.shape[1], logits.shape[2] + 1)
        noise = sampling.gumbel_noise(shape, [self._noise[row] for row in rows]).to(self._device)
        drawn = (logits + temperature[:, None, None] * noise[:, :, 1:]).argmax(-1)
        tokens = torch.where(known, tokens, drawn)
        log_p = logits.log_softmax(-1).gather(-1, drawn[:, :, None])[:, :, 0]
        doubt = (temperature * 4.5 * (1 - progress))[:, None] * noise[:, :, 0]
        at_first = self._start.hidden[rows].sum(1)
        num_hidden = (sampling.cosine_mask_ratio(progress) * at_first).floor().long()
        return tokens, sampling.keep_most_confident(log_p + doubt, known, num_hidden)

    @torch.inference_mode()
    def images(self, rows: Sequence[int]) -> Tensor:
        index = torch.tensor(list(rows), device=self._device)
        with autocast(self._device):
            drawn = to_uint8(self._tokenizer.decode(self._tokens[index]))
        kept = self._start.pixels[index]
        return torch.where(self._start.redrawn[index], drawn, kept).cpu()
