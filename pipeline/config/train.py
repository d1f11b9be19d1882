"""The recipe's sections `train`: optimiser, schedule, stopping and checkpoints of one training.

The other sections, and reading recipes, are in pipeline/config/recipe.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.data import AugmentConfig
from pipeline.config.section import MAX_WIDTH, Config

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Config):
    """One training, with the same settings for tokenizer, aligner and every generator family."""

    policy: Literal["full", "head", "lora", "frozen"] = Field(
        "full",
        description="what trains: everything (full), the head, low-rank adapters and the head "
        "(lora), or everything but the modules that read captions (frozen)",
    )
    lora_rank: int = Field(8, ge=1, le=MAX_WIDTH, description="rank of the adapters")
    lora_alpha: float = Field(16, gt=0, description="scale of the adapters, divided by lora_rank")
    optimizer: Literal["adamw", "sgd", "rmsprop", "muon"] = Field(
        "adamw",
        description="muon orthogonalises the updates of wide matrices (torch.optim.Muon); "
        "embeddings, norms and biases are trained by adamw beside it",
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="peak learning rate; with muon, that of the weights left to adamw"
    )
    muon_learning_rate: float = Field(
        0.02, gt=0, description="peak learning rate of the matrices that muon trains"
    )
    weight_decay: float = Field(
        0.05,
        ge=0,
        description="decay of matrices and kernels; decoupled with adamw and muon, an L2 penalty "
        "with the others",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.95), description="decay rates of adamw's two moments"
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="momentum of sgd, rmsprop and muon")
    warmup_steps: int = Field(100, ge=0, description="optimiser steps of linear warm-up")
    final_learning_rate: float = Field(
        0.01, ge=0, le=1, description="share of the peak learning rate at the end of the cosine"
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="the learning rate after the warm-up"
    )
    batch_size: int = Field(128, ge=1, description="images per step, over all workers together")
    max_steps: int = Field(1_000, ge=1, description="optimiser steps after which training ends")
    time_limit_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which training ends; the schedule ends at whichever limit comes "
        "first, so that the learning rate has always come down by then",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="pieces that a worker computes its share of the batch in, to save memory",
    )
    clip_norm: float = Field(1.0, gt=0, description="largest L2 norm of the gradient")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights; 0: no average"
    )
    validate_every: int = Field(
        200, ge=1, description="steps between validations, each of which leaves a checkpoint"
    )
    sample_every: int = Field(0, ge=0, description="steps between sample grids; 0: one at the end")
    validation_batches: int = Field(8, ge=1, description="batches per validation")
    patience: int = Field(
        0, ge=0, description="validations without a better loss after which training ends; 0: never"
    )
    restore: Literal["best", "last"] = Field(
        "best",
        description="the checkpoint to keep: that of the lowest validation loss, or the last, for "
        "a model that shall know its training images well",
    )
    seed: int = Field(0, ge=0, description="seed of weights, order and randomness")
    num_workers: int = Field(2, ge=1, description="processes that train together (DDP)")
    max_failures: int = Field(2, ge=-1, description="restarts after a worker died; -1: no limit")
    compile: Literal["auto", "always", "never"] = Field(
        "auto",
        description="torch.compile the blocks of transformers; auto: on GPUs alone, since on CPUs "
        "it speeds up pretrained language models, but small networks not at all",
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
"""Settings of TrainConfig that have an effect only with these values of another setting."""
