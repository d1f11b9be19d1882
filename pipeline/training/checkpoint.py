"""Training checkpoints as safetensors and JSON, so that loading one cannot execute code.

A checkpoint is a directory:

    model.safetensors         the network that is trained
    helpers.safetensors       networks that train beside it, such as a discriminator
    ema.safetensors           the moving average of its weights
    optimizer-I.safetensors   the state of each optimiser
    state.json                TrainState, and the average's number of updates

    save_checkpoint(directory, model=model, ema=ema, optimizers=optimizers, state=state)
    state = load_checkpoint(directory, model=model, ema=ema, optimizers=optimizers)
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
from pipeline.training.policy import EMA


@dataclass
class TrainState:
    """Where a training stands.

    Attributes:
        step: number of optimiser steps done.
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
    """Write everything that a training needs to continue from here as if it had not stopped.

    Args:
        directory: exists.
        helpers: networks that train beside the model.
        ema: the moving average of the model's weights.
    """
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
    """Restore the networks, the average and the optimisers in place.

    Returns:
        Where the training stood.

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
    """A checkpoint's weights to generate with: averaged ones where there is an average."""
    weights = load_file(directory / "model.safetensors")
    average = directory / "ema.safetensors"
    if average.exists():
        weights |= load_file(average)
    return weights


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as named tensors: "<parameter index>.<name>"."""
    flat: dict[str, Tensor] = {}
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
                # with the parameter's strides (channels last or not), which fused kernels require
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
