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
from types import ModuleType

import numpy as np

from pipeline import registry
from pipeline.errors import PluginError

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


def load_task(name: str) -> ModuleType:
    """The file of a task, with `SOURCE` and `example`.

    Raises:
        RecipeError: there is no such task; the message lists what there is.
        PluginError: its file does not define these.
    """
    task = registry.load("tasks", name)
    source, example = getattr(task, "SOURCE", None), getattr(task, "example", None)
    if not isinstance(source, bool) or not callable(example):
        raise PluginError(
            f"{task.__file__} must define SOURCE, True or False, and the function example; "
            "pipeline/tasks/README.md shows a task"
        )
    return task


def gives_source(names: Sequence[str]) -> bool:
    """Whether a model that learns these tasks sees source images.

    Raises:
        RecipeError, PluginError: as `load_task` does.
    """
    return any(load_task(name).SOURCE for name in names)
