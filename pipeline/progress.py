"""Watching a distributed training from the driver.

Rank 0 posts its Progress to a small Ray actor; a thread on the driver reads the actor and calls
back, so that a progress bar moves wherever the workers run.

    with watch(on_progress) as board:  # in the driver, with Ray up
        ...                            # rank 0: board.post.remote(Progress(share=0.5, step=100))
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        share: of the training that is done, in [0, 1].
        step: optimiser steps done.
        metrics: the latest ones, by name.
        pid: rank 0's process id.
    """

    share: float = 0.0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    pid: int = 0


OnProgress = Callable[[Progress], None]


class ProgressBoard:
    """Holds the latest Progress; runs as a Ray actor, see `start_board`."""

    def __init__(self) -> None:
        self.latest = Progress()

    def post(self, progress: Progress) -> None:
        self.latest = progress

    def read(self) -> Progress:
        return self.latest


def start_board() -> Any:
    """The handle of a new ProgressBoard actor."""
    import ray  # not with the module: a chain that finds its steps done starts without Ray

    return ray.remote(num_cpus=0)(ProgressBoard).remote()


@contextlib.contextmanager
def watch(on_progress: OnProgress | None, *, every_s: float = 0.5) -> Iterator[Any]:
    """A board; `on_progress` is called with what is posted to it for the duration of the block.

    Args:
        on_progress: called on a thread of its own, once per change that is seen.
        every_s: seconds between two looks at the board.
    """
    import ray

    board = start_board()
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
