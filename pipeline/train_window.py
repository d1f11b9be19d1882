"""What the training loop knows of its latest steps, read no sooner than it has to be."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.errors import TrainingError

CHECK_EVERY = 10  # steps
LOG_EVERY = 10  # steps at least, and as many as take LOG_SECONDS
LOG_SECONDS = 1.0


class Window:
    """The steps since the last log line. Nothing of them is read before it is asked for: a GPU
    would have to be waited for."""

    def __init__(self) -> None:
        self.every, self.since = LOG_EVERY, time.monotonic()
        self.rows: list[dict[str, Tensor]] = []
        self.unchecked: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, metrics: dict[str, Tensor], signs: dict[str, Tensor]) -> None:
        """A step; of each phase the gradient's norm and the loss, (2,)."""
        self.rows.append(metrics)
        self.unchecked.append((step, signs))

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.every

    def check(self) -> None:
        """Whether every step since the last check was sound. A rank that raises leaves the others
        waiting for it, so all check at the same steps.

        Raises:
            TrainingError: a gradient was not finite; names the first step.
        """
        if not self.unchecked:
            return
        phases = list(self.unchecked[0][1])
        signs = [torch.stack([signs[phase] for phase in phases]) for _, signs in self.unchecked]
        for (step, _), of_step in zip(self.unchecked, torch.stack(signs).tolist(), strict=True):
            for phase, (norm, loss) in zip(phases, of_step, strict=True):
                if not math.isfinite(norm):
                    raise TrainingError(
                        f"the gradient of phase {phase!r} is {norm} at step {step} (loss {loss}); "
                        "lower train.learning_rate or train.clip_norm. The last good checkpoint is "
                        "kept"
                    )
        self.unchecked = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done meanwhile out of the time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.since += time.monotonic() - began

    def close(self, batch_size: int) -> tuple[float, dict[str, float]]:
        """Pictures a second, and means, since the last call."""
        means = {
            k: float(torch.stack([row[k] for row in self.rows]).float().mean())
            for k in self.rows[0]
        }
        seconds = time.monotonic() - self.since
        images_per_s = len(self.rows) * batch_size / seconds
        if seconds < LOG_SECONDS:
            self.every *= 2
        elif seconds > 2 * LOG_SECONDS:
            self.every = max(LOG_EVERY, self.every // 2)
        self.rows, self.since = [], time.monotonic()
        return images_per_s, means
