"""Sequential decoding, one image token a step: rows of different ages side by side.

Guided pictures take two rows of the decoder, one of them without the caption.

Shapes: N image tokens, R rows of the decoder, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.contracts import GenerationRequest, ImageTokenizer
from pipeline.models import _sampling as sampling
from pipeline.models._decoding import Decoder
from pipeline.models._drawing import Picture, Rows

WHITE = 1.0


@dataclass
class Prompts:
    """What B new pictures begin with.

    Attributes:
        pictures: B of them.
        inputs: embedded prompts (2 B, P, D), those without captions after those with them.
        keys: bool (2 B, P), padding on the left.
    """

    pictures: list[Picture]
    inputs: Tensor
    keys: Tensor


class SequentialDecoding(Rows[Picture]):
    """contracts.ContinuousBatch.

    Args:
        decoder: the language model's.
        begin: requests as prompts; raises RequestError.
        embed: drawn tokens int64 (R,) -> the decoder's next inputs (R, D).
        tokenizer: decodes image tokens.
        choose_from: logits (B, V) -> the same, -inf where nothing may be drawn.
        device: where to compute.
        guidance_schedule: see sampling.guidance_at.
    """

    def __init__(
        self,
        decoder: Decoder,
        begin: Callable[[Sequence[GenerationRequest]], Prompts],
        embed: Callable[[Tensor], Tensor],
        tokenizer: ImageTokenizer,
        choose_from: Callable[[Tensor], Tensor],
        device: torch.device,
        guidance_schedule: str,
    ) -> None:
        super().__init__(tokenizer, device)
        self._guidance_schedule = guidance_schedule
        self._decoder, self._begin, self._embed = decoder, begin, embed
        self._choose_from = choose_from
        self._rows: list[tuple[Picture, bool]] = []  # by row of the decoder; True: guided
        self._logits = torch.zeros(0)

    @property
    def joinable(self) -> bool:
        return self._decoder.joinable

    @torch.inference_mode()
    def join(self, requests: Sequence[GenerationRequest]) -> range:
        prompts = self._begin(requests)
        fresh, count = prompts.pictures, len(requests)
        free = [i for i, picture in enumerate(fresh) if picture.scale != 1]
        wanted = [*range(count), *(count + i for i in free)]
        logits = self._decoder.add(prompts.inputs[wanted], prompts.keys[wanted])
        self._logits = torch.cat([self._logits, logits]) if self._rows else logits
        self._rows += [(p, True) for p in fresh] + [(fresh[i], False) for i in free]
        return self._enter(fresh)

    @torch.inference_mode()
    def step(self) -> bool:
        self._keep([i for i, (picture, _) in enumerate(self._rows) if not picture.dropped])
        if not self._rows:
            return False
        pictures = [picture for picture, guided in self._rows if guided]
        token = self._draw(pictures)
        for picture, drawn in zip(pictures, token, strict=True):
            picture.tokens[picture.done] = drawn
            picture.done += 1
        place = {id(picture): i for i, picture in enumerate(pictures)}
        going = [i for i, (p, _) in enumerate(self._rows) if p.under_way]
        self._keep(going)
        if self._rows:
            inputs = token[[place[id(picture)] for picture, _ in self._rows]]
            self._logits = self._decoder.step(self._embed(inputs))
        return True

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self._rows):
            return
        index = torch.tensor(rows, dtype=torch.long, device=self._logits.device)
        self._rows = [self._rows[i] for i in rows]
        self._logits = self._logits[index]
        self._decoder.keep(index)

    def _draw(self, pictures: list[Picture]) -> Tensor:
        """The next token of each, int64 (B,)."""
        device = self._logits.device
        guided = [i for i, (_, is_guided) in enumerate(self._rows) if is_guided]
        away = {id(picture): i for i, (picture, _) in enumerate(self._rows)}  # the last row wins
        progress = torch.tensor([(p.done + 1) / p.steps for p in pictures], device=device)
        scale = sampling.guidance_at(
            torch.tensor([picture.scale for picture in pictures], device=device),
            progress,
            self._guidance_schedule,
        )
        temperature = torch.tensor([p.temperature for p in pictures], device=device)
        logits = sampling.classifier_free_guidance(
            self._logits[guided], self._logits[[away[id(picture)] for picture in pictures]], scale
        )
        greedy = temperature < sampling.GREEDY
        logits = self._choose_from(logits / temperature.masked_fill(greedy, 1)[:, None])
        noise = sampling.uniform_noise([1] * len(pictures), [p.noise for p in pictures]).to(device)
        guess = sampling.categorical(logits, (~greedy).float(), noise)
        given = torch.stack([picture.tokens[picture.done] for picture in pictures])
        hidden = torch.stack([picture.hidden[picture.done] for picture in pictures])
        return torch.where(hidden, guess, given)

    @torch.inference_mode()
    def tokens(self, rows: Sequence[int]) -> Tensor:
        """int64 (len(rows), N); those not drawn yet are a white picture's."""
        tokens, found = super().tokens(rows), [self._pictures[row] for row in rows]
        if all(picture.done == picture.steps for picture in found):
            return tokens
        size = self._tokenizer.image_size
        white = torch.full((1, 3, size, size), WHITE, device=tokens.device)
        done = torch.tensor([[picture.done] for picture in found], device=tokens.device)
        drawn = torch.arange(tokens.shape[1], device=tokens.device) < done
        given = ~torch.stack([picture.hidden for picture in found])
        return torch.where(drawn | given, tokens, self._tokenizer.encode(white))
