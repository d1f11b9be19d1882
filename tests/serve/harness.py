"""What the tests of serve share: a generator that needs no training, and a handle on the server.

The generator's pixels are a hash of the request, so what the service promises (batches, isolation,
errors, overload) shows exactly and fast. WordList in the prompt steer it: "slow" takes its time,
"endless" more than anyone waits for, "explode" fails, "refuse" is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import OpenAI
from torch import Tensor

from pipeline.config import ServeConfig
from pipeline.contracts import GenerationRequest, OnStep, TokenCount
from pipeline.errors import BundleError, RequestError
from serve.settings import ServiceConfig

SLOW_S = 0.4

CONFIG = ServeConfig(
    min_replicas=1, max_replicas=1, max_batch_size=4, max_queued_requests=10, num_cpus=0.5
)


def settings(**others: Any) -> ServiceConfig:
    """All settings of a service of one small replica."""
    return ServiceConfig(serve=CONFIG, **others)


STEPS = 4


class HashGenerator:
    """Implements pipeline.contracts.SteppedGenerator; writes the size of every batch to `log`."""

    image_size = 64
    tasks = frozenset({"text_to_image", "completion"})
    styles = ("noto", "twemoji")
    num_steps = STEPS

    def __init__(self, log: Path) -> None:
        self._log = log
        log.with_suffix(".pid").write_text(str(os.getpid()))

    def generate(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        drawing = self.start(requests)
        while drawing.step():
            pass
        return drawing.images(range(len(requests)))

    def start(self, requests: Sequence[GenerationRequest]) -> HashDrawing:
        with self._log.open("a") as log:
            log.write(f"{len(requests)}\n")
        prompts = " ".join(request.prompt for request in requests)
        if "refuse" in prompts:
            raise RequestError("num_steps=3: this model draws in one step", param="num_steps")
        if "explode" in prompts:
            raise RuntimeError("a secret of the server")
        return HashDrawing(requests, self._log.with_suffix(".steps"))

    def count_tokens(self, request: GenerationRequest) -> TokenCount:
        canvas = 16 if request.canvas else 0
        return TokenCount(text=len(request.prompt.split()), canvas=canvas, drawn=16)


class HashDrawing:
    """STEPS steps a row; writes how many rows were left to `log` at every step."""

    def __init__(self, requests: Sequence[GenerationRequest], log: Path) -> None:
        self._requests, self._log = requests, log
        self._done = [0] * len(requests)
        self._dropped: set[int] = set()
        self._pause = SLOW_S / STEPS if any("slow" in r.prompt for r in requests) else 0.0
        self._pause += 1.0 if any("endless" in r.prompt for r in requests) else 0.0

    def step(self) -> bool:
        rows = [r for r, done in enumerate(self._done) if done < STEPS and r not in self._dropped]
        with self._log.open("a") as log:
            log.write(f"{len(rows)}\n")
        time.sleep(self._pause if rows else 0)
        for row in rows:
            self._done[row] += 1
        return bool(rows)

    def progress(self, row: int) -> tuple[int, int]:
        return self._done[row], STEPS

    def drop(self, rows: Sequence[int]) -> None:
        self._dropped |= set(rows)

    def images(self, rows: Sequence[int]) -> Tensor:
        return torch.stack([_pixels(self._requests[row], self._done[row]) for row in rows])


def _pixels(request: GenerationRequest, done: int = STEPS) -> Tensor:
    """A hash of the whole request and how far it is; a canvas stays where its mask is 0."""
    said = repr((dataclasses.astuple(request), done)).encode()
    noise = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(said).digest()[:8], "big") >> 1
    )
    drawn = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=noise)
    if request.canvas is None or request.canvas.mask is None:
        return drawn
    under = torch.frombuffer(bytearray(request.canvas.pixels), dtype=torch.uint8)
    mask = torch.frombuffer(bytearray(request.canvas.mask), dtype=torch.uint8).view(64, 64) != 0
    return torch.where(mask, drawn, under.view(64, 64, 3).permute(2, 0, 1))


def no_weights() -> HashGenerator:
    """A loader that fails."""
    raise BundleError("no weights in the bundle")


@dataclass(frozen=True)
class Running:
    """A server under test: its URL, and where its generator logs the size of every batch."""

    url: str
    log: Path

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        """Ask for pictures without a client library's help."""
        with self.http() as http:
            return http.post("/v1/images/generations", json=body)

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def rows_by_step(self) -> list[int]:
        return [int(line) for line in self.log.with_suffix(".steps").read_text().split()]

    def pid(self) -> int:
        return int(self.log.with_suffix(".pid").read_text())

    def batch_sizes(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()]
