"""Sinks: where a run's settings, metrics and images go besides MLflow.

A recipe names them: `tracking: {sinks: [tensorboard, wandb]}`. `runs.RunLogger` opens, feeds
and closes them.

    tensorboard   event files in HOME/tensorboard/NAME-RUN; show them with
                  `tensorboard --logdir HOME/tensorboard`
    wandb         a Weights & Biases run of the same name and id, also kept in HOME/wandb; with
                  WANDB_MODE=offline nowhere else. WANDB_PROJECT and the account are settings of
                  Weights & Biases.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class SinkAddress:
    """Which sinks a run has and under what name; small enough to send to any worker.

    Attributes:
        names: keys of SINKS.
        home: the home directory.
        run_id: MLflow's.
        run_name: MLflow's.
        group: the id of the run that this one is nested in, or its own.
    """

    names: tuple[str, ...]
    home: str
    run_id: str
    run_name: str
    group: str


class Sink(Protocol):
    """One run's records in one place."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings; they add to those that were recorded before."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers of a step."""

    def image(self, name: str, image: Image, step: int) -> None:
        """Record an image of a step."""

    def close(self) -> None:
        """Write what is left and let other processes open the same run."""


class TensorBoardSink:
    """Event files as torch.utils.tensorboard writes them; settings become one text, a table."""

    def __init__(self, address: SinkAddress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = f"{address.run_name}-{address.run_id[:8]}"
        self.writer: Any = SummaryWriter(str(Path(address.home) / "tensorboard" / folder))

    def params(self, values: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self.writer.add_text("parameters", f"| name | value |\n|---|---|\n{rows}")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, name: str, image: Image, step: int) -> None:
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """A Weights & Biases run with MLflow's run id, so that every process continues the same run."""

    def __init__(self, address: SinkAddress) -> None:
        import wandb

        self.wandb = wandb
        self.run: Any = wandb.init(
            id=address.run_id, name=address.run_name, group=address.group, resume="allow",
            dir=address.home, reinit="create_new", settings=wandb.Settings(silent=True),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def params(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def image(self, name: str, image: Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(image), "step": step})

    def close(self) -> None:
        self.run.finish()


SINKS: Mapping[str, Callable[[SinkAddress], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}


def check_sinks(names: Sequence[str]) -> None:
    """Make sure that sinks can be opened.

    Raises:
        MissingExtraError: a sink's package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"tracking.sinks with {name}", name)


def open_sinks(address: SinkAddress | None) -> list[Sink]:
    """The sinks of a run, ready to write; the process that opened them closes them."""
    return [SINKS[name](address) for name in address.names] if address else []
