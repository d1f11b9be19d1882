"""Sequential decoding, one image token a step: rows of different ages side by side.

Every picture follows its own noise, so that pictures may join, end or be dropped while others go
on. Guided pictures take two rows of the decoder, one of them without the caption.

Shapes: N image tokens, R rows of the decoder, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.contracts import GenerationRequest, ImageTokenizer
from pipeline.models import _sampling as sampling
from pipeline.models._canvas import Start, decoded
from pipeline.models._decoding import Decoder

WHITE = 1.0


@dataclass
class Prompts:
    """What B new pictures begin with.

    Attributes:
        inputs: embedded prompts (2 B, P, D), those without captions after those with them.
        keys: bool (2 B, P), padding on the left.
        start: what their canvases give.
        noise: B generators.
        scale, temperature: float (B,).
    """

    inputs: Tensor
    keys: Tensor
    start: Start
    noise: list[torch.Generator]
    scale: Tensor
    temperature: Tensor


@dataclass(eq=False)
class _Picture:
    """One of them; `tokens` are drawn up to `done`, and those not `hidden` are given."""

    tokens: Tensor
    hidden: Tensor
    pixels: Tensor
    redrawn: Tensor
    noise: torch.Generator
    scale: float
    temperature: float
    done: int = 0
    dropped: bool = False


class SequentialDrawing:
    """contracts.JoinableDrawing.

    Args:
        decoder: the language model's.
        begin: requests as prompts; raises RequestError.
        embed: drawn tokens int64 (R,) -> the decoder's next inputs (R, D).
        tokenizer: decodes image tokens.
        choose_from: logits (B, V) -> the same, -inf where nothing may be drawn.
        num_tokens: N.
        guidance_schedule: see sampling.guidance_at.
    """

    def __init__(
        self,
        decoder: Decoder,
        begin: Callable[[Sequence[GenerationRequest]], Prompts],
        embed: Callable[[Tensor], Tensor],
        tokenizer: ImageTokenizer,
        choose_from: Callable[[Tensor], Tensor],
        num_tokens: int,
        guidance_schedule: str,
    ) -> None:
        self._guidance_schedule = guidance_schedule
        self._decoder, self._begin, self._embed = decoder, begin, embed
        self._tokenizer, self._choose_from, self._num_tokens = tokenizer, choose_from, num_tokens
        self._pictures: dict[int, _Picture] = {}  # by row of the drawing, but the forgotten ones
        self._joined = 0
        self._rows: list[tuple[_Picture, bool]] = []  # by row of the decoder; True: guided
        self._logits = torch.zeros(0)

    @property
    def joinable(self) -> bool:
        return self._decoder.joinable

    @torch.inference_mode()
    def join(self, requests: Sequence[GenerationRequest]) -> range:
        prompts = self._begin(requests)
        start, count = prompts.start, len(requests)
        fresh = [
            _Picture(
                start.tokens[i], start.hidden[i], start.pixels[i], start.redrawn[i],
                prompts.noise[i], float(prompts.scale[i]), float(prompts.temperature[i]),
            )
            for i in range(count)
        ]  # fmt: skip
        free = [i for i, picture in enumerate(fresh) if picture.scale != 1]
        wanted = [*range(count), *(count + i for i in free)]
        logits = self._decoder.add(prompts.inputs[wanted], prompts.keys[wanted])
        self._logits = torch.cat([self._logits, logits]) if self._rows else logits
        self._rows += [(p, True) for p in fresh] + [(fresh[i], False) for i in free]
        rows = range(self._joined, self._joined + count)
        self._pictures |= dict(zip(rows, fresh, strict=True))
        self._joined += count
        return rows

    def progress(self, row: int) -> tuple[int, int]:
        return self._pictures[row].done, self._num_tokens

    def drop(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._pictures[row].dropped = True

    def forget(self, rows: Sequence[int]) -> None:
        self.drop(rows)
        for row in rows:
            del self._pictures[row]

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
        going = [i for i, (p, _) in enumerate(self._rows) if p.done < self._num_tokens]
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

    def _draw(self, pictures: list[_Picture]) -> Tensor:
        """The next token of each, int64 (B,)."""
        device = self._logits.device
        guided = [i for i, (_, is_guided) in enumerate(self._rows) if is_guided]
        away = {id(picture): i for i, (picture, _) in enumerate(self._rows)}  # the last row wins
        progress = torch.tensor([(p.done + 1) / self._num_tokens for p in pictures], device=device)
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
        found = [self._pictures[row] for row in rows]
        tokens = torch.stack([picture.tokens for picture in found])
        done = torch.tensor([picture.done for picture in found], device=tokens.device)
        if (done == self._num_tokens).all():
            return tokens
        size = self._tokenizer.image_size
        white = torch.full((1, 3, size, size), WHITE, device=tokens.device)
        drawn = torch.arange(self._num_tokens, device=tokens.device) < done[:, None]
        given = ~torch.stack([picture.hidden for picture in found])
        return torch.where(drawn | given, tokens, self._tokenizer.encode(white))

    @torch.inference_mode()
    def images(self, rows: Sequence[int]) -> Tensor:
        found = [self._pictures[row] for row in rows]
        drawn = decoded(self._tokenizer, self.tokens(rows), self._logits.device)
        kept = torch.stack([picture.pixels for picture in found])
        redrawn = torch.stack([picture.redrawn for picture in found])
        return torch.where(redrawn, drawn, kept).cpu()
