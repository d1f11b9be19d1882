"""What a recipe may say of a training.

The other sections, and reading recipes, are in pipeline/config.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config_section import Config
from pipeline.data_config import AugmentConfig


class TrainConfig(Config):
    """One training: optimiser, schedule, stopping. The same words for every family."""

    policy: Literal["full", "head", "lora", "frozen"] = Field(
        "full", description="what trains: everything, the head, adapters, or all but the text side"
    )
    lora_rank: int = Field(8, ge=1, description="of the adapters, with policy lora")
    lora_alpha: float = Field(16, gt=0, description="adapters count lora_alpha / lora_rank")
    optimizer: Literal["adamw", "sgd", "rmsprop", "muon"] = Field(
        "adamw",
        description="muon orthogonalises the updates of wide matrices (torch.optim.Muon); "
        "embeddings, norms and biases take adamw beside it",
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="peak; of adamw's part when muon is chosen"
    )
    muon_learning_rate: float = Field(0.02, gt=0, description="peak; of muon's part")
    weight_decay: float = Field(
        0.05,
        ge=0,
        description="of matrices and kernels; decoupled with adamw and muon, L2 with the others",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="adamw")
    momentum: float = Field(0.95, ge=0, lt=1, description="sgd, rmsprop and muon")
    warmup_steps: int = Field(100, ge=0, description="linear, optimiser steps")
    final_learning_rate: float = Field(
        0.01, ge=0, le=1, description="of the peak; end of the cosine"
    )
    schedule: Literal["cosine", "constant"] = "cosine"
    batch_size: int = Field(128, ge=1, description="pictures a step over all workers together")
    max_steps: int = Field(1_000, ge=1, description="optimiser steps")
    time_limit_s: float | None = Field(
        None,
        gt=0,
        description="seconds of training; the schedule ends at whichever limit comes first, so the "
        "learning rate has always come down when training stops",
    )
    accumulate: int = Field(
        1, ge=1, description="pieces a worker's share of the batch is computed in, to save memory"
    )
    clip_norm: float = Field(1.0, gt=0, description="largest L2 norm of the gradient")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="0 switches the average off")
    validate_every: int = Field(
        200, ge=1, description="steps between validations, each of which leaves a checkpoint"
    )
    sample_every: int = Field(0, ge=0, description="steps between sample grids; 0: at the end only")
    validation_batches: int = Field(8, ge=1, description="batches a validation reads")
    patience: int = Field(0, ge=0, description="validations without a better one; 0 never stops")
    restore: Literal["best", "last"] = Field(
        "best",
        description="the checkpoint to go on with: the lowest validation loss, or the last, "
        "for a model that shall know its training pictures well",
    )
    seed: int = Field(0, ge=0)
    num_workers: int = Field(2, ge=1, description="DDP processes")
    max_failures: int = Field(2, ge=-1, description="worker group restarts; -1 is no limit")
    compile: Literal["auto", "always", "never"] = Field(
        "auto",
        description="torch.compile what repeats in a network; auto: where a GPU trains; "
        "on CPUs it speeds up pretrained language models, and small networks not at all",
    )
    augment: AugmentConfig = AugmentConfig()


ONLY_WITH = {
    "lora_rank": ("policy", "lora"),
    "lora_alpha": ("policy", "lora"),
    "muon_learning_rate": ("optimizer", "muon"),
    "momentum": ("optimizer", "sgd", "rmsprop", "muon"),
    "betas": ("optimizer", "adamw", "muon"),
    "final_learning_rate": ("schedule", "cosine"),
}
"""Settings of TrainConfig that act with some values of another one alone."""
