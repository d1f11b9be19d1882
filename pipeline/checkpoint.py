"""Training checkpoints as safetensors and JSON: nothing in them can execute.

A checkpoint directory holds model.safetensors, helpers.safetensors (networks that train beside the
model, such as a discriminator), ema.safetensors, optimizer-I.safetensors for each optimiser and
state.json (step, elapsed seconds, best validation, EMA updates).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.finetune import EMA


@dataclass
class TrainState:
    """Where a training stands.

    Attributes:
        step: optimiser steps done.
        elapsed_s: seconds of training so far, restarts included.
        best: lowest validation loss so far.
        bad_validations: validations since then.
        finished: True once a limit or early stopping ended the training.
    """

    step: int = 0
    elapsed_s: float = 0.0
    best: float = float("inf")
    bad_validations: int = 0
    finished: bool = False


def save_checkpoint(
    directory: Path,
    *,
    model: nn.Module,
    helpers: nn.ModuleList | None = None,
    ema: EMA | None,
    optimizers: Sequence[torch.optim.Optimizer],
    state: TrainState,
) -> None:
    """Write everything a training needs to go on exactly here."""
    save_file(_contiguous(model.state_dict()), directory / "model.safetensors")
    if helpers:
        save_file(_contiguous(helpers.state_dict()), directory / "helpers.safetensors")
    if ema is not None:
        save_file(_contiguous(ema.average), directory / "ema.safetensors")
    for i, optimizer in enumerate(optimizers):
        save_file(_flatten(optimizer), directory / f"optimizer-{i}.safetensors")
    record = asdict(state) | {"ema_updates": ema.updates if ema else 0}
    (directory / "state.json").write_text(json.dumps(record))


def load_checkpoint(
    directory: Path,
    *,
    model: nn.Module,
    helpers: nn.ModuleList | None = None,
    ema: EMA | None,
    optimizers: Sequence[torch.optim.Optimizer],
) -> TrainState:
    """Restore in place.

    Raises:
        TrainingError: the checkpoint is of another model.
    """
    try:
        model.load_state_dict(load_file(directory / "model.safetensors"))
        if helpers:
            helpers.load_state_dict(load_file(directory / "helpers.safetensors"))
    except RuntimeError as error:
        raise TrainingError(
            f"the checkpoint in {directory} does not fit the recipe's model ({error}); "
            "give the run another name or remove the directory"
        ) from error
    record = json.loads((directory / "state.json").read_text())
    updates = record.pop("ema_updates")
    if ema is not None:
        for name, tensor in load_file(directory / "ema.safetensors").items():
            ema.average[name].copy_(tensor)
        ema.updates = updates
    for i, optimizer in enumerate(optimizers):
        _unflatten(optimizer, load_file(directory / f"optimizer-{i}.safetensors"))
    return TrainState(**record)


def best_weights(directory: Path) -> dict[str, Tensor]:
    """The weights to use of a checkpoint: the averaged ones where there are any."""
    weights = load_file(directory / "model.safetensors")
    average = directory / "ema.safetensors"
    if average.exists():
        weights |= load_file(average)
    return weights


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as named tensors: "<parameter index>.<name>"."""
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:
                flat[f"{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return flat


def _unflatten(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # as the parameter lies in memory, channels last or not: fused kernels read both so
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
