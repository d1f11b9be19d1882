"""Linear layers whose weights stay as they are, laid out once as the CPU's kernels read them.

Which kernel multiplies, and so a row's last bits, depends on how many rows there are, on the number
of threads and on the CPU. A picture must not depend on those drawn beside it. So it is tried, once
for every shape, which numbers of rows give the same: `Picturewise` layers let no more pictures
share a product than is without effect, `Rowwise` ones multiply further rows of zeros.
"""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedLinear:
    """F.linear with fixed weights, for few rows at a time.

    oneDNN multiplies by weights in blocks of its own. Packed beforehand they need no rearranging in
    every call. Off x86 CPUs this is F.linear.

    Args:
        weight: (O, I), contiguous; kept packed alone where it can be.
        bias: (O,) of the same dtype.
        gelu: its tanh approximation follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> None:
        self.after = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.packed = weight.device.type == "cpu" and _can_pack()
        self.kind = _Kind(
            tuple(weight.shape), bias is not None, weight.dtype, gelu, torch.get_num_threads()
        )
        # the operators that torch.compile's freezing emits (torch/_inductor/mkldnn_ir.py)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """(R, I), the weight's dtype -> (R, O)."""
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y, approximate="tanh") if self.after[0] == "gelu" else y
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.after)
        return made


ROW_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
READING_ROWS = 16  # reading the weights takes about as long as multiplying so many rows


class Rowwise:
    """A linear layer with fixed weights whose result for a row is the same to the bit whatever rows
    are beside it, on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.product = PackedLinear(weight, bias)
        self.missing: tuple[int, ...] = ()  # rows of zeros, by the number of rows
        if weight.device.type == "cpu":
            self.missing = _missing(_alike(self.product.kind))

    def __call__(self, x: Tensor) -> Tensor:
        """(R, I), the weight's dtype -> (R, O)."""
        rows = len(x)
        if not self.missing:
            return self.product(x)
        if rows >= len(self.missing):
            return torch.cat([self(part) for part in x.split(len(self.missing) - 1)])
        if missing := self.missing[rows]:
            return self.product(F.pad(x, (0, 0, 0, missing)))[:rows]
        return self.product(x)


class Picturewise(nn.Module):
    """A linear layer whose results for a picture are the same to the bit whatever pictures are
    beside it.

    Args:
        linear: the layer; later changes to it are not seen.
        dtype: of the products.
        rows: of one picture, side by side.
        gelu: see `PackedLinear`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        dtype: torch.dtype,
        rows: int,
        *,
        gelu: bool = False,
    ) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        weight = linear.weight.detach().to(dtype).contiguous()
        self.product = PackedLinear(weight, bias, gelu=gelu)
        self.dtype, self.rows = dtype, rows
        self.together = _together(self.product.kind, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I), whose rows are whole pictures' -> (..., O)."""
        parts = x.to(self.dtype).flatten(0, -2).split(self.rows * self.together)
        return torch.cat([self.product(part) for part in parts]).view(*x.shape[:-1], -1)


MOST_TOGETHER = 8


@cache
def _together(kind: _Kind, rows: int) -> int:
    """How many pictures of so many rows can share a product here, found by trying: as many as give
    what each gives alone."""
    product, x = kind.trial(MOST_TOGETHER * rows)
    alone = torch.cat([product(part) for part in x.split(rows)])
    for count in range(2, MOST_TOGETHER + 1):
        if not torch.equal(product(x[: count * rows]), alone[: count * rows]):
            return count - 1
    return MOST_TOGETHER


@cache
def _alike(kind: _Kind) -> tuple[int, ...]:
    """Numbers of rows, ascending, in whose products a row comes out the same wherever it stands; of
    all such families among ROW_COUNTS the one with the least to do."""
    product, x = kind.trial(ROW_COUNTS[-1])
    families: list[tuple[Tensor, list[int]]] = []
    for count in reversed(ROW_COUNTS):
        made = product(x[:count])
        if not torch.equal(product(x[:count].flip(0)).flip(0), made):
            continue
        for expected, counts in families:
            if torch.equal(expected[:count], made):
                counts.insert(0, count)
                break
        else:
            families.append((made, [count]))
    return min((tuple(counts) for _, counts in families), key=_work)


def _work(counts: tuple[int, ...]) -> float:
    """What filling up or splitting into these numbers of rows adds, over all of ROW_COUNTS."""
    missing = _missing(counts)
    work = 0.0
    for rows in ROW_COUNTS:
        products, rest = divmod(rows, counts[-1])
        filled = products * counts[-1] + (rest + missing[rest] if rest else 0)
        products += bool(rest)
        work += (products * READING_ROWS + filled) / (READING_ROWS + rows)
    return work


def _missing(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of zeros to add, by the number of rows."""
    return tuple(min(c for c in counts if c >= rows) - rows for rows in range(counts[-1] + 1))


@dataclass(frozen=True)
class _Kind:
    """What decides, beside the number of rows, which kernel multiplies."""

    shape: tuple[int, ...]
    bias: bool
    dtype: torch.dtype
    gelu: bool
    threads: int

    def trial(self, rows: int) -> tuple[PackedLinear, Tensor]:
        """Such a product, and something to multiply whose sums cancel out but for rounding: another
        order of summation shows in every bit."""
        (wide, narrow), noise = self.shape, torch.Generator().manual_seed(0)
        columns = torch.randperm(narrow, generator=noise)

        def cancelling(rows: int, sign: int) -> Tensor:
            half = torch.randn(rows, narrow // 2, generator=noise)
            odd = torch.zeros(rows, narrow % 2)
            return torch.cat([half, sign * half, odd], 1)[:, columns].to(self.dtype)

        zeros = torch.zeros(wide, dtype=self.dtype) if self.bias else None
        product = PackedLinear(cancelling(wide, -1), zeros, gelu=self.gelu)
        return product, cancelling(rows, 1)


M = TypeVar("M", bound=nn.Module)


def with_modules(module: M, **others: nn.Module) -> M:
    """A copy of `module`, whose parameters it shares, with other modules of these names."""
    made = copy.copy(module)
    made._modules = module._modules | others
    return made


def has_adapters(model: nn.Module) -> bool:
    """Whether layers carry LoRA's adapters (peft), which their weights alone do not know of."""
    return any(hasattr(module, "base_layer") for module in model.modules())


@cache
def _can_pack() -> bool:
    return (
        platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    )
