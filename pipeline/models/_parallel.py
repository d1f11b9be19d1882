"""Parallel decoding, one step at a time: hidden image tokens are guessed, the surest guesses stay.

MaskGIT (Chang et al. 2022, arXiv 2202.04200), sec. 3.2. Every picture follows its own schedule.

Shapes: B pictures, N image tokens, R pictures drawn in a step, K of their tokens hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.contracts import GenerationRequest, ImageTokenizer
from pipeline.models import _sampling as sampling
from pipeline.models._drawing import Picture, Rows
from pipeline.runtime import autocast

CHOICE_TEMPERATURE = 4.5  # of what stays known, at first; falls to 0 (MaskGIT's code)

Reading = tuple[Tensor, ...]
"""What the network has read: every tensor (2, ...), with the caption and without."""

Guess = Callable[[Reading, Tensor, Tensor], Tensor]
"""(readings (2 R, ...), tokens (2 R, N), hidden bool (2 R, N)) -> features (2 R, N, D), every
picture's with its caption and without side by side."""

Head = Callable[[Tensor], Tensor]
"""Features (K, D) -> logits (K, V), K a multiple of N; linear, so guidance may come before it."""


@dataclass(eq=False, kw_only=True)
class ReadPicture(Picture):
    """A picture whose `known` tokens, bool (N,), grow."""

    reading: Reading
    known: Tensor


class ParallelDecoding(Rows[ReadPicture]):
    """contracts.ContinuousBatch.

    Args:
        begin: requests as pictures; raises RequestError.
        guess: the network's opinion.
        head: makes logits of it.
        tokenizer: decodes image tokens.
        device: where to compute.
        guidance_schedule: see sampling.guidance_at.
    """

    joinable = True

    def __init__(
        self,
        begin: Callable[[Sequence[GenerationRequest]], list[ReadPicture]],
        guess: Guess,
        head: Head,
        tokenizer: ImageTokenizer,
        device: torch.device,
        guidance_schedule: str,
    ) -> None:
        super().__init__(tokenizer, device)
        self._begin, self._guess, self._head = begin, guess, head
        self._guidance_schedule = guidance_schedule

    @torch.inference_mode()
    def join(self, requests: Sequence[GenerationRequest]) -> range:
        return self._enter(self._begin(requests))

    @torch.inference_mode()
    def step(self) -> bool:
        pictures = [picture for picture in self._pictures.values() if picture.under_way]
        if not pictures:
            return False
        with autocast(self._device):
            tokens, known = self._advance(pictures)
        for picture, its_tokens, its_known in zip(pictures, tokens, known, strict=True):
            picture.tokens, picture.known = its_tokens, its_known
            picture.done += 1
        return True

    def _advance(self, pictures: Sequence[ReadPicture]) -> tuple[Tensor, Tensor]:
        """Tokens int64 (R, N) and which of them are known after one more step."""
        tokens = torch.stack([picture.tokens for picture in pictures])
        known = torch.stack([picture.known for picture in pictures])
        progress = self._column([(p.done + 1) / p.steps for p in pictures])
        readings = zip(*(picture.reading for picture in pictures), strict=True)
        features = self._guess(
            tuple(torch.cat(parts) for parts in readings),
            tokens.repeat_interleave(2, 0),
            ~known.repeat_interleave(2, 0),
        )
        conditional, unconditional = features.float().unflatten(0, (-1, 2)).unbind(1)
        scale = sampling.guidance_at(
            self._column([p.scale for p in pictures]), progress, self._guidance_schedule
        )
        features = sampling.classifier_free_guidance(conditional, unconditional, scale)
        logits = self._logits(features[~known])
        counts = (~known).sum(1)
        temperature = self._column([p.temperature for p in pictures]).repeat_interleave(counts)
        pick, doubt = self._random(pictures, counts)
        drawn = sampling.categorical(logits, temperature, pick)
        log_p = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(1)
        # one picture at a time: where a logarithm or cosine stands in a row is part of its last bit
        doubt = torch.cat([sampling.gumbel(part) for part in doubt.split(counts.tolist())])
        doubt = doubt * CHOICE_TEMPERATURE * temperature
        doubt = doubt * (1 - progress).repeat_interleave(counts)
        confidence = torch.zeros(known.shape, device=self._device)
        tokens[~known], confidence[~known] = drawn, log_p + doubt
        at_first = torch.stack([picture.hidden for picture in pictures]).sum(1)
        ratio = torch.stack([sampling.cosine_mask_ratio(part) for part in progress])
        num_hidden = (ratio * at_first).floor().long()
        return tokens, sampling.keep_most_confident(confidence, known, num_hidden)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _random(self, pictures: Sequence[ReadPicture], counts: Tensor) -> Tensor:
        """Two numbers for every hidden token, from its picture's generator: (2, K)."""
        noise = [picture.noise for picture in pictures]
        parts = [sampling.uniform_noise(counts.tolist(), noise).to(self._device) for _ in range(2)]
        return torch.stack(parts)

    def _logits(self, features: Tensor) -> Tensor:
        """Of K hidden tokens, as a multiple of N: kernels that are made and kept for every shape
        they meet (oneDNN's are) then meet few."""
        missing = -len(features) % self._tokenizer.grid_size**2
        return self._head(F.pad(features, (0, 0, 0, missing))).float()[: len(features)]
