"""Where a run's settings, numbers and pictures go beside MLflow; for pipeline/tracking.py alone.

    recipe: tracking: {sinks: [tensorboard, wandb]}

tensorboard   event files in HOME/tensorboard/NAME-RUN (`tensorboard --logdir HOME/tensorboard`)
wandb         a Weights & Biases run of the same name and id; with WANDB_MODE=offline it only lies
              in HOME/wandb; WANDB_PROJECT and the account are Weights & Biases' own settings
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import MissingExtraError


@dataclass(frozen=True)
class SinkAddress:
    """Which sinks a run has and under what name; small enough to travel to any worker."""

    names: tuple[str, ...]
    home: str
    run_id: str
    run_name: str
    group: str


class Sink(Protocol):
    """One place for one run's records; a process that is done with it closes it."""

    def params(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, image: Any, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """torch.utils.tensorboard's event files; parameters as one text."""

    def __init__(self, address: SinkAddress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = f"{address.run_name}-{address.run_id[:8]}"
        self.writer = SummaryWriter(str(Path(address.home) / "tensorboard" / folder))

    def params(self, values: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self.writer.add_text("parameters", f"| name | value |\n|---|---|\n{rows}")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, name: str, image: Any, step: int) -> None:
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """A Weights & Biases run with MLflow's run id, so that every process goes on in the same."""

    def __init__(self, address: SinkAddress) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            id=address.run_id, name=address.run_name, group=address.group, resume="allow",
            dir=address.home, reinit="create_new", settings=wandb.Settings(silent=True),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def params(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def image(self, name: str, image: Any, step: int) -> None:
        self.run.log({name: self.wandb.Image(image), "step": step})

    def close(self) -> None:
        self.run.finish()


SINKS: Mapping[str, type[TensorBoardSink] | type[WandbSink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}


def check_sinks(names: Sequence[str]) -> None:
    """Raises MissingExtraError for a sink whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"tracking.sinks with {name}", name)


def open_sinks(address: SinkAddress | None) -> list[Sink]:
    """The sinks of a run, ready to write."""
    return [SINKS[name](address) for name in address.names] if address else []
