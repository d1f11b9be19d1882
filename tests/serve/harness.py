"""What the tests of serve share: a generator that needs no training, and a handle on the server.

The generator's pixels are a hash of the request, so what the service promises (batches, isolation,
errors, overload) shows exactly and fast. Words in the prompt steer it: "slow" takes its time,
"explode" fails, "refuse" is refused.
"""

from __future__ import annotations

import hashlib
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
from pipeline.contracts import GenerationRequest, OnStep
from pipeline.errors import BundleError, RequestError

SLOW_S = 0.4

CONFIG = ServeConfig(
    min_replicas=1, max_replicas=1, max_batch_size=4, max_queued_requests=10, num_cpus=0.5
)


class HashGenerator:
    """Implements pipeline.contracts.ImageGenerator; writes the size of every batch to `log`."""

    image_size = 64
    tasks = frozenset({"text_to_image"})
    styles = ("noto", "twemoji")

    def __init__(self, log: Path) -> None:
        self._log = log

    def generate(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        with self._log.open("a") as log:
            log.write(f"{len(requests)}\n")
        prompts = " ".join(request.prompt for request in requests)
        if "slow" in prompts:
            time.sleep(SLOW_S)
        if "refuse" in prompts:
            raise RequestError("num_steps=3: this model draws in one step", param="num_steps")
        if "explode" in prompts:
            raise RuntimeError("a secret of the server")
        return torch.stack([_pixels(request) for request in requests])


def _pixels(request: GenerationRequest) -> Tensor:
    digest = hashlib.sha256(repr(request).encode()).digest()
    noise = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=noise)


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

    def batch_sizes(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()]
