"""Parallel decoding: a step predicts all hidden tokens, and the most confident ones stay.

MaskGIT (Chang et al. 2022, arXiv 2202.04200), sec. 3.2, with classifier-free guidance as in Muse
(Chang et al. 2023, arXiv 2301.00704), sec. 2.7. Every image follows its own schedule of steps.

Shapes: R active images, N image tokens, K hidden tokens of all R images, D width of the features,
V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.contracts import GenerationRequest, ImageTokenizer
from pipeline.models.decoding import sampling
from pipeline.models.decoding.rows import DecodingBatch, DecodingState
from pipeline.runtime import autocast

CHOICE_TEMPERATURE = 4.5
"""Of the noise on the confidence in the first step; it falls linearly to 0 (MaskGIT's code)."""

Conditioning = tuple[Tensor, ...]
"""What the network knows of a caption and a style. Of one image every tensor is (2, ...): with the
caption first, then without it or with the negative prompt."""


class TokenPredictor(NamedTuple):
    """A network that predicts hidden image tokens.

    Attributes:
        features: (conditioning (2 R, ...), tokens int64 (2 R, N), hidden bool (2 R, N)) -> features
            (2 R, N, D). An image's two rows, with and without its caption, follow each other.
        logits: features (K, D), K a multiple of N -> logits (K, V). It is linear, so guidance may
            come before it.
    """

    features: Callable[[Conditioning, Tensor, Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]


@dataclass(eq=False, kw_only=True)
class ParallelState(DecodingState):
    """An image whose known tokens grow in number.

    Attributes:
        conditioning: read once, whatever the number of steps.
        known: bool (N,), the tokens that later steps keep.
    """

    conditioning: Conditioning
    known: Tensor


class ParallelDecoding(DecodingBatch[ParallelState]):
    """contracts.ContinuousBatch of a masked model.

    Args:
        begin: makes states of requests; raises RequestError.
        predictor: the network.
        tokenizer: decodes image tokens.
        device: where to compute.
        guidance_schedule: see sampling.guidance_scale_at.
    """

    joinable = True

    def __init__(
        self,
        begin: Callable[[Sequence[GenerationRequest]], list[ParallelState]],
        predictor: TokenPredictor,
        tokenizer: ImageTokenizer,
        device: torch.device,
        guidance_schedule: str,
    ) -> None:
        super().__init__(tokenizer, device)
        self._begin, self._predictor = begin, predictor
        self._guidance_schedule = guidance_schedule

    @torch.inference_mode()
    def join(self, requests: Sequence[GenerationRequest]) -> range:
        """See contracts.ContinuousBatch."""
        return self._add(self._begin(requests))

    @torch.inference_mode()
    def step(self) -> bool:
        """See contracts.GenerationBatch."""
        active = [state for state in self._states.values() if state.active]
        if not active:
            return False
        with autocast(self._device):
            tokens, known = self._advance(active)
        for state, its_tokens, its_known in zip(active, tokens, known, strict=True):
            state.tokens, state.known = its_tokens, its_known
            state.steps_done += 1
        return True

    def _advance(self, states: Sequence[ParallelState]) -> tuple[Tensor, Tensor]:
        """Tokens int64 (R, N), and which of them are known after one more step, bool (R, N)."""
        tokens = torch.stack([state.tokens for state in states])
        known = torch.stack([state.known for state in states])
        progress = self._column([state.next_progress for state in states])  # (R,)
        counts = (~known).sum(1)  # (R,), they add up to K
        temperature = self._column([state.request.temperature for state in states])
        temperature = temperature.repeat_interleave(counts)  # (K,)
        logits = self._logits(self._guided_features(states, tokens, known, progress)[~known])
        uniform, noise = self._random_numbers(states, counts.tolist())
        sampled = sampling.categorical(logits, temperature, uniform)
        log_p = logits.gather(1, sampled[:, None])[:, 0] - logits.logsumexp(1)
        noise = noise * CHOICE_TEMPERATURE * temperature
        noise = noise * (1 - progress).repeat_interleave(counts)
        confidence = torch.zeros(known.shape, device=self._device)
        tokens[~known], confidence[~known] = sampled, log_p + noise
        num_hidden = _num_hidden(states, progress)
        return tokens, sampling.keep_most_confident(confidence, known, num_hidden)

    def _guided_features(
        self, states: Sequence[ParallelState], tokens: Tensor, known: Tensor, progress: Tensor
    ) -> Tensor:
        """(R, N, D)."""
        conditioning = zip(*(state.conditioning for state in states), strict=True)
        features = self._predictor.features(
            tuple(torch.cat(parts) for parts in conditioning),
            tokens.repeat_interleave(2, 0),
            ~known.repeat_interleave(2, 0),
        ).float()
        conditional, unconditional = features[0::2], features[1::2]
        scale = self._column([state.request.guidance_scale for state in states])
        scale = sampling.guidance_scale_at(scale, progress, self._guidance_schedule)
        return sampling.classifier_free_guidance(conditional, unconditional, scale)

    def _logits(self, features: Tensor) -> Tensor:
        """(K, D) -> float (K, V), computed for a multiple of N rows: oneDNN makes and keeps a
        kernel for every shape it meets, and so it meets few."""
        missing = -len(features) % self._tokenizer.grid_size**2
        return self._predictor.logits(F.pad(features, (0, 0, 0, missing))).float()[: len(features)]

    def _random_numbers(
        self, states: Sequence[ParallelState], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Of every hidden token a uniform number in [0, 1) and Gumbel noise, float (K,) both, from
        its image's generator alone."""
        rngs = [state.rng for state in states]
        uniform = sampling.uniform_noise(counts, rngs).to(self._device)
        other = sampling.uniform_noise(counts, rngs).to(self._device)
        # per image: a logarithm's last bit depends on where in a tensor its number stands
        parts = torch.split(other, list(counts))
        noise = torch.cat([sampling.gumbel_noise(part) for part in parts])
        return uniform, noise

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _num_hidden(states: Sequence[ParallelState], progress: Tensor) -> Tensor:
    """How many tokens stay hidden after the step, int64 (R,) (MaskGIT, sec. 3.2, step 3)."""
    hidden_at_first = torch.stack([state.canvas.hidden for state in states]).sum(1)
    # per image: a cosine's last bit depends on where in a tensor its number stands
    ratio = torch.stack([sampling.cosine_mask_ratio(part) for part in progress])
    return (ratio * hidden_at_first).floor().long()
