"""The latest steps of a training: their metrics for the log, and whether gradients were finite.

A GPU works ahead of the Python code that feeds it, and reading a tensor waits for it. So the values
of many steps are kept as tensors on the device and read together:

    window = Window()
    window.add(step, metrics, gradients)    # every step; nothing is read
    window.check()                          # every CHECK_EVERY steps; raises for a bad gradient
    if window.full:
        images_per_s, means = window.close(batch_size)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.errors import TrainingError

CHECK_EVERY = 10
"""Steps between two checks of the gradients."""
LOG_EVERY = 10
"""Fewest steps between two log lines."""
LOG_SECONDS = 1.0
"""Time between two log lines that the number of steps is adapted to."""


class Window:
    """The steps since the last log line.

    Attributes:
        every: steps until the next log line.
        since: when the first of these steps began, by `time.monotonic`.
        rows: the metrics of each step.
        unchecked: number and gradients of each step since the last check.
    """

    def __init__(self) -> None:
        self.every, self.since = LOG_EVERY, time.monotonic()
        self.rows: list[dict[str, Tensor]] = []
        self.unchecked: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, metrics: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Keep a step's values without reading them.

        Args:
            step: its number.
            metrics: scalars by name.
            gradients: for each phase a tensor (2,): the gradient's norm and the loss.
        """
        self.rows.append(metrics)
        self.unchecked.append((step, gradients))

    @property
    def full(self) -> bool:
        """Whether it is time for a log line."""
        return len(self.rows) >= self.every

    def check(self) -> None:
        """Make sure that the gradients of every step since the last check were finite.

        All ranks must check at the same steps: one that raises alone leaves the others waiting.

        Raises:
            TrainingError: a gradient was not finite; names the first step.
        """
        if not self.unchecked:
            return
        phases = list(self.unchecked[0][1])
        values = torch.stack(
            [torch.stack([gradients[phase] for phase in phases]) for _, gradients in self.unchecked]
        )  # (steps, phases, 2)
        for (step, _), of_step in zip(self.unchecked, values.tolist(), strict=True):
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
        """Leave the duration of the block out of the images per second."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.since += time.monotonic() - began

    def close(self, batch_size: int) -> tuple[float, dict[str, float]]:
        """End the window and begin the next, which has twice or half as many steps if this one took
        much less or more than LOG_SECONDS.

        Returns:
            Images per second, and the mean of every metric, since the last call.
        """
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
