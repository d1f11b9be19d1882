"""Every MLflow call of Tessera.

The tracking URI is MLFLOW_TRACKING_URI, or a sqlite database under the home directory. One parent
run per retrain, one nested run per step; runs are created on the driver and workers write to them
by id, so a restarted worker goes on in the same run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

logger = logging.getLogger(__name__)

EXPERIMENT = "tessera"
CHAMPION = "champion"


@dataclass(frozen=True)
class RunHandle:
    """A run by its address, small enough to travel to any worker."""

    tracking_uri: str
    run_id: str


class RunLogger:
    """Writes parameters, metrics and images of one run; does nothing without a handle."""

    def __init__(self, handle: RunHandle | None) -> None:
        self.run_id = handle.run_id if handle else None
        self.client = MlflowClient(handle.tracking_uri) if handle else None

    def params(self, values: Mapping[str, Any]) -> None:
        if self.client is not None:
            params = [Param(name, str(value)[:6000]) for name, value in values.items()]
            self.client.log_batch(self.run_id, params=params)

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        if self.client is not None:
            now = _now_ms()
            batch = [Metric(name, float(value), now, step) for name, value in values.items()]
            self.client.log_batch(self.run_id, metrics=batch)

    def image(self, name: str, image: Any, *, step: int) -> None:
        """A PIL image as an artifact samples/NAME-STEP.png."""
        if self.client is not None:
            self.client.log_image(self.run_id, image, artifact_file=f"{name}/{step:07d}.png")


def _now_ms() -> int:
    import time

    return int(time.time() * 1000)


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database under `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').absolute()}"
