"""Tasks: how a captioned image becomes a training example, what a model sees and what it predicts.

A task is one file of this folder, and its name is the file's. It defines `SOURCE`, whether the
model sees a source image, and

    example(image_tokens, rng) -> Example

which makes one training example from an image's tokens, with all randomness from `rng`. A recipe
names its tasks (`generator.tasks`); each example is of one of them, in equal shares. Models see
caption, source and target alone and never ask which task they serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import registry

__path__ = registry.search_path(__name__)


@dataclass(frozen=True)
class Example:
    """One training example of N image tokens.

    Attributes:
        source: int64 (N,), the image to go on from.
        given: bool (N,), the source tokens that the model sees. They are also the target's tokens
            at these positions, so there is nothing to predict there.
        target: int64 (N,), the image to predict.
    """

    source: np.ndarray
    given: np.ndarray
    target: np.ndarray


def gives_source(names: Sequence[str]) -> bool:
    """Whether a model that learns these tasks sees source images.

    Raises:
        RecipeError: there is no such task; the message lists what there is.
    """
    tasks = [registry.load("tasks", name) for name in names]
    return any(task.SOURCE for task in tasks)
