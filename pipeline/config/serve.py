"""The section `serve` of a recipe: replicas and batches.

The service's own settings hold the same section (serve/settings.py, ServiceConfig.serve). A recipe
may have it too, because how many replicas a model needs belongs to the model.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipeline.config.section import Config


class ServeConfig(Config):
    """How many generator replicas there are, what each takes, and how large its batches are."""

    min_replicas: int = Field(1, ge=0, description="replicas that run even without requests")
    max_replicas: int = Field(2, ge=1, description="replicas that run under load, at most")
    target_ongoing_requests: float = Field(
        4.0, gt=0, description="images per replica, on average, above which another one is started"
    )
    upscale_delay_s: float = Field(
        30.0, ge=0, description="seconds of load before a replica is started"
    )
    downscale_delay_s: float = Field(
        600.0, ge=0, description="seconds of quiet before a replica is stopped"
    )
    max_batch_size: int = Field(8, ge=1, description="images generated together by one replica")
    batch_wait_s: float = Field(
        0.02, ge=0, description="seconds that the first of a batch waits for others, at most"
    )
    max_queued_requests: int = Field(
        64,
        ge=10,
        description="images that may wait for a replica; a request for more is answered 429; at "
        "least 10, because one request may ask for as many",
    )
    num_cpus: float = Field(
        1.0, ge=0, description="CPUs per replica, as Ray counts them; the replica's threads as well"
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs per replica; 0: generate on the CPU; None: 1 if there are GPUs, else 0",
    )

    @model_validator(mode="after")
    def _max_is_at_least_min(self) -> Self:
        if self.max_replicas < max(1, self.min_replicas):
            raise ValueError(
                f"serve.max_replicas={self.max_replicas} is less than serve.min_replicas="
                f"{self.min_replicas}: raise it, or keep fewer"
            )
        return self
