"""Packed linear layers against F.linear, and that what is computed beside a row never shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.decoding.packed import (
    ImageInvariantLinear,
    PackedLinear,
    RowInvariantLinear,
    _padding,
    _work,
)
from pipeline.models.decoding.packed_masked import with_modules
from pipeline.runtime import autocast_dtype

DTYPES = {torch.float32, autocast_dtype(torch.device("cpu")) or torch.float32}


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def cancelling(rows: int, columns: int, sign: int, dtype: torch.dtype) -> Tensor:
    """Products with opposite signs leave nothing but rounding, which shows how was summed up."""
    half = torch.randn(rows, columns // 2)
    mixed = torch.randperm(columns, generator=torch.Generator().manual_seed(7))
    return torch.cat([half, sign * half], 1)[:, mixed].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize(("wide", "narrow"), [(70, 33), (256, 683)])
@torch.inference_mode()
def test_it_multiplies(
    dtype: torch.dtype, with_bias: bool, gelu: bool, wide: int, narrow: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(wide, narrow, dtype=dtype), torch.randn(wide, dtype=dtype)
    x = torch.randn(40, narrow, dtype=dtype)
    expected = F.linear(x.float(), weight.float(), bias.float() if with_bias else None)
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    made = PackedLinear(weight, bias if with_bias else None, gelu=gelu)(x)
    error = 1e-4 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(made.float(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("wide", "narrow"), [(256, 768), (576, 1536), (768, 256)])
@torch.inference_mode()
def test_no_row_sees_another(threads: int, dtype: torch.dtype, wide: int, narrow: int) -> None:
    torch.manual_seed(1)
    layer = RowInvariantLinear(cancelling(wide, narrow, -1, dtype))
    x = cancelling(150, narrow, 1, dtype)
    alone = torch.cat([layer(row[None]) for row in x])
    for rows in (2, 3, 7, 16, 33, 64, 65, 150):
        assert torch.equal(layer(x[:rows]), alone[:rows]), rows


def test_of_numbers_of_rows_that_agree_the_cheapest_are_taken() -> None:
    few, many = (1, 2, 4, 8, 16, 32), (48, 64)
    assert _padding(few)[:6] == (1, 0, 0, 1, 0, 3)
    assert _work(few) < _work(many), "a row would be filled up to 48"
    assert _work((1, *few[1:], *many)) < _work(few), "64 rows read the weights twice"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("wide", "narrow"), [(256, 1024), (1024, 256)])
@torch.inference_mode()
def test_no_image_sees_another(threads: int, dtype: torch.dtype, wide: int, narrow: int) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(narrow, wide, bias=False)
    linear.weight.copy_(cancelling(wide, narrow, -1, torch.float32))
    layer = ImageInvariantLinear(linear, dtype, rows=128, gelu=wide > narrow)
    x = cancelling(11 * 128, narrow, 1, dtype).view(11, 2, 64, narrow)
    alone = torch.cat([layer(image[None]) for image in x])
    for count in range(2, 12):
        assert torch.equal(layer(x[:count]), alone[:count]), count


def test_a_copy_with_other_modules_shares_the_rest() -> None:
    whole = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other = with_modules(whole, **{"1": nn.Identity()})
    assert other[0] is whole[0] and isinstance(whole[1], nn.Linear)
    assert isinstance(other[1], nn.Identity)
