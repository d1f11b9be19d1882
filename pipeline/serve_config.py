"""What a recipe may say of the service's replicas and batches; `serve/settings.py` has the rest."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipeline.config_section import Config


class ServeConfig(Config):
    """The service: replicas and batches."""

    min_replicas: int = Field(1, ge=0, description="kept however quiet it is")
    max_replicas: int = Field(2, ge=1, description="started under load")
    target_ongoing_requests: float = Field(
        4.0, gt=0, description="pictures a replica works on before another is started"
    )
    upscale_delay_s: float = Field(30.0, ge=0, description="of load before one is started")
    downscale_delay_s: float = Field(600.0, ge=0, description="of quiet before one is stopped")
    max_batch_size: int = Field(8, ge=1, description="pictures drawn together")
    batch_wait_s: float = Field(0.02, ge=0, description="for others to join a batch")
    max_queued_requests: int = Field(
        64, ge=10, description="pictures; more are answered 429, and one request asks for up to 10"
    )
    num_cpus: float = Field(1.0, ge=0, description="of Ray's logical CPUs, a replica")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="a replica; 0 draws on the CPU; None: 1 where there are GPUs, else 0",
    )

    @model_validator(mode="after")
    def _at_least_one_and_no_fewer_than_kept(self) -> Self:
        if self.max_replicas < max(1, self.min_replicas):
            raise ValueError(
                f"serve.max_replicas={self.max_replicas} is less than serve.min_replicas="
                f"{self.min_replicas}: raise it, or keep fewer"
            )
        return self
