"""Packed linear layers against F.linear."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.models._packed import PackedLinear
from pipeline.runtime import autocast_dtype

DTYPES = {torch.float32, autocast_dtype(torch.device("cpu")) or torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("wide", "narrow"), [(70, 33), (256, 683)])
@torch.inference_mode()
def test_it_multiplies_and_no_row_sees_another(
    dtype: torch.dtype, with_bias: bool, wide: int, narrow: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(wide, narrow, dtype=dtype), torch.randn(wide, dtype=dtype)
    layer = PackedLinear(weight, bias if with_bias else None)
    x = torch.randn(40, narrow, dtype=dtype)
    expected = F.linear(x.float(), weight.float(), bias.float() if with_bias else None)
    error = 1e-4 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(layer(x).float(), expected, rtol=error, atol=error)
    for rows in (1, 2, 7, 16):
        assert torch.equal(layer(x[:rows]), layer(x)[:rows]), rows
