"""Parallel decoding, one step at a time: hidden image tokens are guessed, the surest guesses stay.

MaskGIT (Chang et al. 2022, arXiv 2202.04200), sec. 3.2. Every row follows its own schedule and its
own noise, so rows may end, or be dropped, while the others go on.

Shapes: B pictures, N image tokens, R rows drawn in a step, K of their tokens hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.contracts import ImageTokenizer
from pipeline.models import _sampling as sampling
from pipeline.models._canvas import decoded, lay_out
from pipeline.models._requests import Settings
from pipeline.runtime import autocast

CHOICE_TEMPERATURE = 4.5  # of what stays known, at first; falls to 0 (MaskGIT's code)

Head = Callable[[Tensor], Tensor]
"""Features (..., D) -> logits float (..., V); linear, so guidance may come before it."""

Guess = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Head]]
"""(rows int64 (R,), tokens (R, N), hidden bool (R, N)) -> features (R, N, D) with and without the
caption, and what makes logits of them."""


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
        self._noise = [sampling.noise_of(seed) for seed in settings.seeds]
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
        conditional, unconditional, head = self._guess(rows, tokens, ~known)
        scale = sampling.guidance_at(self._scale[rows], progress, self._guidance_schedule)
        features = sampling.classifier_free_guidance(
            conditional.float(), unconditional.float(), scale
        )
        logits = self._logits(head, features[~known])
        counts = (~known).sum(1)
        temperature = self._temperature[rows].repeat_interleave(counts)
        pick, doubt = self._random(rows, counts)
        drawn = sampling.categorical(logits, temperature, pick)
        log_p = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(1)
        doubt = sampling.gumbel(doubt) * CHOICE_TEMPERATURE * temperature
        doubt = doubt * (1 - progress).repeat_interleave(counts)
        confidence = torch.zeros(known.shape, device=self._device)
        tokens[~known], confidence[~known] = drawn, log_p + doubt
        at_first = self._start.hidden[rows].sum(1)
        num_hidden = (sampling.cosine_mask_ratio(progress) * at_first).floor().long()
        return tokens, sampling.keep_most_confident(confidence, known, num_hidden)

    def _random(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Two numbers for every hidden token, from its picture's generator: (2, K)."""
        noise = [self._noise[row] for row in rows]
        parts = [sampling.uniform_noise(counts.tolist(), noise).to(self._device) for _ in range(2)]
        return torch.stack(parts)

    def _logits(self, head: Head, features: Tensor) -> Tensor:
        """Of K hidden tokens, as a multiple of N: kernels that are made and kept for every shape
        they meet (oneDNN's are) then meet few."""
        missing = -len(features) % self._tokens.shape[1]
        return head(F.pad(features, (0, 0, 0, missing)))[: len(features)]

    @torch.inference_mode()
    def images(self, rows: Sequence[int]) -> Tensor:
        index = torch.tensor(list(rows), device=self._device)
        drawn = decoded(self._tokenizer, self._tokens[index], self._device)
        kept = self._start.pixels[index]
        return torch.where(self._start.redrawn[index], drawn, kept).cpu()
