"""A generator that needs no training: its pixels are a hash of the request.

What the service promises (batches, isolation, errors, overload) shows with it exactly and fast.
Words in the prompt steer it: "slow" takes its time, "explode" fails, "refuse" is refused.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.contracts import GenerationRequest, OnStep
from pipeline.errors import RequestError

SLOW_S = 0.4


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
