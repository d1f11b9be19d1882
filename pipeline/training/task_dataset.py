"""A data set of tokenized images as training examples of several tasks.

Shapes: B examples, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks import load_task
from pipeline.training import feed


class TaskDataset:
    """feed.Dataset over another one that makes each row an example of one task.

    Batches gain "source_tokens" int64 (B, N) and "source_given" bool (B, N), see `Example`;
    "image_tokens" is the target. A row's task and its example depend on the row's own draws alone;
    without draws, as in validation, on the row's number.

    Args:
        rows: whose batches have "image_tokens", int64 (B, N).
        names: of the tasks, which get equal shares of the rows.
    """

    def __init__(self, rows: feed.Dataset, names: Sequence[str]) -> None:
        self.rows, self.weights = rows, rows.weights
        self.tasks = [load_task(name) for name in names]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray, draws: np.ndarray | None) -> dict[str, Tensor]:
        batch = self.rows.batch(rows, draws)
        bits = rows[:, None] if draws is None else (draws * 2**53).astype(np.int64)
        examples = []
        for tokens, seed in zip(batch["image_tokens"].numpy(), bits.tolist(), strict=True):
            rng = np.random.default_rng(seed)
            examples.append(self.tasks[rng.integers(len(self.tasks))].example(tokens, rng))
        return batch | {
            "image_tokens": torch.from_numpy(np.stack([e.target for e in examples])),
            "source_tokens": torch.from_numpy(np.stack([e.source for e in examples])),
            "source_given": torch.from_numpy(np.stack([e.given for e in examples])),
        }
