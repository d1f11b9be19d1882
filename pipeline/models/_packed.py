"""Linear layers whose weights stay as they are, laid out once as the CPU's kernels read them."""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


class PackedLinear:
    """F.linear with fixed weights, for few rows at a time.

    oneDNN multiplies by weights in blocks of its own. Packed beforehand they need no rearranging in
    every call, and a row's result is the same to the bit whatever rows are beside it, which
    F.linear in float32 does not grant. Off x86 CPUs this is F.linear.

    Args:
        weight: (O, I), contiguous; kept packed alone where it can be.
        bias: (O,) of the same dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = weight.device.type == "cpu" and _can_pack()
        # the operators that torch.compile's freezing emits (torch/_inductor/mkldnn_ir.py)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """(R, I), the weight's dtype -> (R, O)."""
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


@cache
def _can_pack() -> bool:
    return (
        platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    )
