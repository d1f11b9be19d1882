"""Tasks: how a captioned picture becomes what a model reads and what it shall answer.

A task is one file. It has `SOURCE`, whether the model sees a source picture, and

    example(image_tokens, rng) -> Example

which makes one training example of a picture's tokens, with all randomness from `rng`. A recipe
names its tasks (`generator.tasks`); each example is of one of them, in equal shares. Models see
captions, source and target alone and never ask which task they serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import registry

__path__ = registry.search_path(__name__)


@dataclass(frozen=True)
class Example:
    """One training example; N image tokens.

    Attributes:
        source: int64 (N,), the picture to start from, as image tokens.
        given: bool (N,), which of them the model sees.
        target: int64 (N,), the picture it shall draw. Where a source token is given, it is the
            target's own.
    """

    source: np.ndarray
    given: np.ndarray
    target: np.ndarray


def gives_source(names: Sequence[str]) -> bool:
    """Whether a model that learns these tasks sees source pictures.

    Raises:
        RecipeError: there is no such task; the message lists what there is.
    """
    tasks = [registry.load("tasks", name) for name in names]
    return any(task.SOURCE for task in tasks)
