"""What the training loop knows of its latest steps, read no sooner than it has to be."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from pipeline.errors import TrainingError

LOG_EVERY = 10  # steps, or as many as take LOG_SECONDS
LOG_SECONDS = 1.0


class Window:
    """The steps since the last log line. Nothing of them is read before it is asked for: a GPU
    would have to be waited for."""

    def __init__(self) -> None:
        self.every = LOG_EVERY
        self._empty()

    def _empty(self) -> None:
        self.rows: list[dict[str, Tensor]] = []
        self.unchecked: list[tuple[int, dict[str, Tensor]]] = []
        self.since = time.monotonic()

    def add(self, step: int, metrics: dict[str, Tensor], signs: dict[str, Tensor]) -> None:
        """A step; of each phase the gradient's norm and the loss, (2,)."""
        self.rows.append(metrics)
        self.unchecked.append((step, signs))

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.every

    def check(self) -> None:
        """Whether every step since the last check was sound.

        Raises:
            TrainingError: a gradient was not finite; names the first step.
        """
        for phase in self.unchecked[0][1] if self.unchecked else ():
            signs = torch.stack([signs[phase] for _, signs in self.unchecked]).tolist()
            for (step, _), (norm, loss) in zip(self.unchecked, signs, strict=True):
                if not math.isfinite(norm):
                    raise TrainingError(
                        f"the gradient of phase {phase!r} is {norm} at step {step} (loss {loss}); "
                        "lower train.learning_rate or train.clip_norm. The last good checkpoint is "
                        "kept"
                    )
        self.unchecked = []

    def close(self, batch_size: int) -> tuple[float, dict[str, float]]:
        """Pictures a second, and means, since the last call.

        Raises:
            TrainingError: as `check`.
        """
        self.check()
        means = {
            k: float(torch.stack([row[k] for row in self.rows]).float().mean())
            for k in self.rows[0]
        }
        seconds = time.monotonic() - self.since
        images_per_s = len(self.rows) * batch_size / seconds
        if seconds < LOG_SECONDS:
            self.every *= 2
        self._empty()
        return images_per_s, means
