"""Fine-tuning policies, optimisers, the learning rate's schedule and the average of the weights.

A policy (TrainConfig.policy) says what trains, in every family:

    full    everything
    head    the model's `head_modules()`: new embeddings, output head, last blocks
    lora    low-rank adapters (peft) beside the matrices and kernels of all the rest; the head
            modules train in full
    frozen  everything but the model's `text_modules()`

    trainable, total = apply_policy(model, config)
    optimizers = build_optimizers(model, config)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is (in, out)

from pipeline.config import TrainConfig
from pipeline.errors import MissingExtraError, RecipeError
from pipeline.objective import TrainableNetwork

_ADAPTER = ".lora_"  # part of the names that peft gives adapters' weights
MUON_MODULES = (nn.Linear, nn.Conv2d, Conv1D)
DECAYED_MODULES = (*MUON_MODULES, nn.ConvTranspose2d, nn.MultiheadAttention)
MIN_MUON_SIDE = 64  # narrower matrices gain nothing from orthogonalised updates


def apply_policy(model: TrainableNetwork, config: TrainConfig) -> tuple[int, int]:
    """Set requires_grad as config.policy says; lora also adds adapters to the model, in place.

    Returns:
        (trainable, total) parameter counts.

    Raises:
        RecipeError: the model offers no such policy, or has nothing for the optimizer muon.
        MissingExtraError: lora without peft.
    """
    _check_policy(model, config.policy)
    if config.policy == "lora":
        _add_adapters(model, config)
    head, text = (
        {p for module in modules or () for p in module.parameters()}
        for modules in (model.head_modules(), model.text_modules())
    )
    everything = set(model.parameters())
    adapters = {p for name, p in model.named_parameters() if _ADAPTER in name}
    chosen = {
        "full": everything, "head": head, "lora": head | adapters, "frozen": everything - text,
    }[config.policy]  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in chosen)
    if config.optimizer == "muon" and not _sort_parameters(model)[0]:
        raise RecipeError(
            f"train.optimizer=muon: {type(model).__name__} has nothing for muon, no trainable "
            f"matrix of {MIN_MUON_SIDE} rows and columns or more; take adamw"
        )
    return sum(p.numel() for p in chosen), sum(p.numel() for p in everything)


def _check_policy(model: TrainableNetwork, policy: str) -> None:
    """Refuse a policy that the model does not offer.

    Raises:
        RecipeError: the message lists what it offers.
    """
    offered = ["full"]
    offered += ["head", "lora"] if model.head_modules() is not None else []
    offered += ["frozen"] if model.text_modules() is not None else []
    if policy not in offered:
        raise RecipeError(
            f"train.policy={policy!r} is not offered by {type(model).__name__}, which offers: "
            f"{', '.join(offered)}"
        )


def merged_weights(
    model: TrainableNetwork, config: TrainConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Merge a training's adapters into the weights: what the model without adapters has to load.

    Args:
        model: a model as before `apply_policy`; changed in place.
        weights: of the model with adapters.
    """
    _add_adapters(model, config)
    model.load_state_dict(weights)
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
    return model.state_dict()


def adapter_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' weights alone; empty for policies other than lora."""
    return {name: tensor for name, tensor in weights.items() if _ADAPTER in name}


def _add_adapters(model: TrainableNetwork, config: TrainConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("train.policy=lora", "lora") from error
    head = {id(inner) for module in model.head_modules() or () for inner in module.modules()}
    # The fused path of nn.TransformerEncoderLayer reads its weights directly, without adapters.
    fused = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    fixed = head | {id(inner) for module in fused for inner in module.modules()}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, MUON_MODULES) and id(module) not in fixed
    ]
    if not targets:
        raise RecipeError(
            f"train.policy=lora: {type(model).__name__} has no linear layer or convolution beside "
            "its head; take another policy"
        )
    alpha: Any = config.lora_alpha  # declared int by peft, which divides it by the rank
    settings = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets)
    inject_adapter_in_model(settings, model)


def build_optimizers(
    model: nn.Module, config: TrainConfig, *, ratio: float = 1.0
) -> list[torch.optim.Optimizer]:
    """One optimiser; with muon two, if there are hidden matrices: muon for these, adamw for others.

    Learning rates are `ratio` times the recipe's. Only matrices and kernels decay, not norms,
    biases and embedding tables. Every parameter group keeps its peak learning rate as "peak_lr",
    which `set_learning_rate` scales.
    """
    hidden, decayed, plain = _sort_parameters(model)
    if config.optimizer == "muon" and hidden:
        muon = KernelMuon(
            hidden,
            lr=config.muon_learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        kernels = [p for p in decayed if id(p) not in {id(h) for h in hidden}]
        optimizers: list[torch.optim.Optimizer] = [muon, _adamw(kernels, plain, config)]
    elif config.optimizer in ("adamw", "muon"):
        optimizers = [_adamw(decayed, plain, config)]
    else:
        groups = _groups(decayed, plain, config)
        kind = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}[config.optimizer]
        optimizers = [kind(groups, lr=config.learning_rate, momentum=config.momentum)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"] = group["lr"] * ratio
    return optimizers


class KernelMuon(torch.optim.Muon):
    """torch.optim.Muon, which takes matrices only, extended to convolution kernels.

    A kernel (out, in, height, width) is viewed as the matrix (out, in * height * width), as Jordan
    et al. 2024 ("Muon: An optimizer for hidden layers in neural networks") do. The views share the
    weights' memory: create the optimiser after the model was moved to its device.
    """

    def __init__(
        self, weights: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        self.weights = weights
        self.matrices = [nn.Parameter(_as_matrix(weight.detach(), weight)) for weight in weights]
        for weight, matrix in zip(weights, self.matrices, strict=True):
            assert weight.data_ptr() == matrix.data_ptr(), "not a view"
        super().__init__(self.matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad, weight)
        loss: float | None = super().step(closure)  # type: ignore[no-untyped-call]
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None


def _as_matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """A view of a tensor (out, ...) as (out, rest), in the order of `weight`'s memory."""
    channels_last = weight.ndim == 4 and not weight.is_contiguous()
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).flatten(1)


def _adamw(
    decayed: list[nn.Parameter], plain: list[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    groups = _groups(decayed, plain, config)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _groups(
    decayed: list[nn.Parameter], plain: list[nn.Parameter], config: TrainConfig
) -> list[dict[str, object]]:
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _sort_parameters(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters as three lists: hidden matrices, all that decay, all that do not.

    Matrices and kernels decay: the weights of DECAYED_MODULES, spectrally normalised or not. Hidden
    matrices, which muon trains, are those of MUON_MODULES that have at least MIN_MUON_SIDE rows and
    columns; they are among those that decay.
    """
    hidden, decayed, plain = [], [], []
    for name, module in model.named_modules():
        layer = module
        if isinstance(module, ParametrizationList):  # it holds the weight of its parent
            layer = model.get_submodule(name.rpartition(".parametrizations.")[0])
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if parameter.ndim < 2 or not isinstance(layer, DECAYED_MODULES):
                plain.append(parameter)
                continue
            decayed.append(parameter)
            wide = min(len(parameter), parameter[0].numel()) >= MIN_MUON_SIDE
            if wide and isinstance(layer, MUON_MODULES):
                hidden.append(parameter)
    return hidden, decayed, plain


def learning_rate_factor(config: TrainConfig, *, step: int, progress: float) -> float:
    """The learning rate as a share of its peak: linear warm-up, times a cosine or a constant.

    Args:
        step: optimiser steps done.
        progress: share of the training's budget that is used, in [0, 1].
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every parameter group to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class EMA:
    """Exponential moving average of a model's trainable weights, with a warm-up of the decay.

    The decay at update t is min(decay, (1 + t) / (10 + t)), so that the average of a short run does
    not hang on its first steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.average.values()), [now[name] for name in self.average], 1 - decay
        )

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; calling it again undoes it."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                current = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(current)
