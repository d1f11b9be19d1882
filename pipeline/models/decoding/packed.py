"""Batch-invariant linear layers of fixed weights, packed once as oneDNN reads them.

Which kernel multiplies, and so the last bits of a row, depends on the number of rows, on the number
of threads and on the CPU. An image must not depend on those generated beside it. So it is tried,
once per shape, which numbers of rows give the same bits: `ImageInvariantLinear` lets no more images
share a product than is without effect, `RowInvariantLinear` multiplies further rows of zeros.

Gain of the packing, one decoding step's products of the small causal model on 2 CPU cores,
F.linear's time / packed: float32 1.84 / 0.73 ms for 1 row, 3.64 / 1.05 for 8, 6.07 / 2.53 for 32;
bfloat16 1.15 / 0.61, 1.39 / 0.79, 2.34 / 1.44 (tests/benchmarks/history.md, of PyTorch's operators
alone). What that makes of whole images is in llama.py and packed_masked.py.

Shapes: R rows, I width of the input, O width of the output.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedLinear:
    """F.linear of fixed weights, for few rows at a time.

    oneDNN multiplies by weights in blocks of its own. Packed beforehand they need no rearranging in
    every call. The operators are PyTorch's private ones, which torch.compile's freezing emits
    (torch/_inductor/mkldnn_ir.py). Off x86 CPUs this is F.linear.

    Args:
        weight: (O, I), contiguous; kept packed alone where it can be.
        bias: (O,) of the same dtype.
        gelu: whether GELU's tanh approximation follows, in the same kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> None:
        self.gelu = gelu
        self.packed = weight.device.type == "cpu" and _can_pack()
        self.kind = ProductKind(
            tuple(weight.shape), bias is not None, weight.dtype, gelu, torch.get_num_threads()
        )
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """(R, I), the weight's dtype -> (R, O)."""
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y, approximate="tanh") if self.gelu else y
        name, algorithm = ("gelu", "tanh") if self.gelu else ("none", "")
        multiplied: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, name, [], algorithm
        )
        return multiplied


ROW_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of rows that are tried."""

WEIGHT_READ_ROWS = 16
"""Reading the weights takes about as long as multiplying so many rows."""


class RowInvariantLinear:
    """A linear layer whose result for a row is, on a CPU, the same to the bit whatever rows are
    beside it.

    Args:
        weight: (O, I), contiguous.
        bias: (O,) of the same dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.product = PackedLinear(weight, bias)
        self.padding: tuple[int, ...] = ()  # rows of zeros to add, by the number of rows
        if weight.device.type == "cpu":
            self.padding = _padding(_agreeing_row_counts(self.product.kind))

    def __call__(self, x: Tensor) -> Tensor:
        """(R, I), the weight's dtype -> (R, O)."""
        rows = len(x)
        if not self.padding:
            return self.product(x)
        if rows >= len(self.padding):
            return torch.cat([self(part) for part in torch.split(x, len(self.padding) - 1)])
        if padding := self.padding[rows]:
            return self.product(F.pad(x, (0, 0, 0, padding)))[:rows]
        return self.product(x)


MAX_IMAGES = 8
"""Most images that share a product."""


class ImageInvariantLinear(nn.Module):
    """A linear layer whose results for an image are the same to the bit whatever images are beside
    it.

    Args:
        linear: the layer; later changes to it are not seen.
        dtype: of the products.
        rows: of one image, side by side.
        gelu: see `PackedLinear`.
    """

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, rows: int, *, gelu: bool = False
    ) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        weight = linear.weight.detach().to(dtype).contiguous()
        self.product = PackedLinear(weight, bias, gelu=gelu)
        self.dtype, self.rows = dtype, rows
        self.images_per_product = _images_per_product(self.product.kind, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I), whose rows are whole images' -> (..., O)."""
        parts = torch.split(x.to(self.dtype).flatten(0, -2), self.rows * self.images_per_product)
        return torch.cat([self.product(part) for part in parts]).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class ProductKind:
    """What decides, beside the number of rows, which kernel multiplies."""

    shape: tuple[int, ...]
    bias: bool
    dtype: torch.dtype
    gelu: bool
    threads: int

    def trial(self, rows: int) -> tuple[PackedLinear, Tensor]:
        """Such a product, and an input of so many rows, (R, I). All sums cancel out but for
        rounding, so that another order of summation shows in every bit."""
        (outputs, inputs), rng = self.shape, torch.Generator().manual_seed(0)
        columns = torch.randperm(inputs, generator=rng)

        def cancelling(rows: int, sign: int) -> Tensor:
            half = torch.randn(rows, inputs // 2, generator=rng)
            odd = torch.zeros(rows, inputs % 2)
            return torch.cat([half, sign * half, odd], 1)[:, columns].to(self.dtype)

        zeros = torch.zeros(outputs, dtype=self.dtype) if self.bias else None
        product = PackedLinear(cancelling(outputs, -1), zeros, gelu=self.gelu)
        return product, cancelling(rows, 1)


@cache
def _images_per_product(kind: ProductKind, rows: int) -> int:
    """How many images of so many rows can share a product, found by trying: as many as give what
    each gives alone."""
    product, x = kind.trial(MAX_IMAGES * rows)
    alone = torch.cat([product(part) for part in torch.split(x, rows)])
    for count in range(2, MAX_IMAGES + 1):
        if not torch.equal(product(x[: count * rows]), alone[: count * rows]):
            return count - 1
    return MAX_IMAGES


@cache
def _agreeing_row_counts(kind: ProductKind) -> tuple[int, ...]:
    """Numbers of rows, ascending, in whose products a row comes out the same wherever it stands; of
    all such families among ROW_COUNTS the one with the least to do."""
    product, x = kind.trial(ROW_COUNTS[-1])
    families: list[tuple[Tensor, list[int]]] = []
    for count in reversed(ROW_COUNTS):
        result = product(x[:count])
        if not torch.equal(product(x[:count].flip(0)).flip(0), result):
            continue
        for expected, counts in families:
            if torch.equal(expected[:count], result):
                counts.insert(0, count)
                break
        else:
            families.append((result, [count]))
    return min((tuple(counts) for _, counts in families), key=_work)


def _work(counts: tuple[int, ...]) -> float:
    """What padding or splitting into these numbers of rows adds, over all of ROW_COUNTS."""
    padding = _padding(counts)
    work = 0.0
    for rows in ROW_COUNTS:
        products, rest = divmod(rows, counts[-1])
        multiplied = products * counts[-1] + (rest + padding[rest] if rest else 0)
        products += bool(rest)
        work += (products * WEIGHT_READ_ROWS + multiplied) / (WEIGHT_READ_ROWS + rows)
    return work


def _padding(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of zeros to add, by the number of rows."""
    return tuple(min(c for c in counts if c >= rows) - rows for rows in range(counts[-1] + 1))


@cache
def _can_pack() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available()
