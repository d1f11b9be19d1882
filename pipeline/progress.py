"""Watching a distributed training from the driver.

Rank 0 tells a small actor where it is; a thread on the driver reads the actor and calls back, so
that a progress bar moves wherever the workers run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray


@dataclass(frozen=True)
class Progress:
    """Where a training is: share done in [0, 1], step, latest metrics, rank 0's process id."""

    share: float = 0.0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    pid: int = 0


OnProgress = Callable[[Progress], None]


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds the latest Progress."""

    def __init__(self) -> None:
        self.latest = Progress()

    def post(self, progress: Progress) -> None:
        self.latest = progress

    def read(self) -> Progress:
        return self.latest


@contextlib.contextmanager
def watch(on_progress: OnProgress | None, *, every_s: float = 0.5) -> Iterator[Any]:
    """A board whose news reach `on_progress` for the duration of the block."""
    board = ProgressBoard.remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def follow() -> None:
        seen = Progress()
        while not stop.wait(every_s):
            latest = ray.get(board.read.remote())
            if latest != seen and on_progress is not None:
                on_progress(latest)
            seen = latest

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        ray.kill(board)
