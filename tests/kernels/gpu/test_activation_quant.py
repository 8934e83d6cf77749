"""Quantised activations: to the bit what the formula gives in torch."""

import pytest
import torch
from torch import Tensor

from pagewire.kernels.gpu.activation_quant import LARGEST, quantize_tokens
from pagewire.kernels.gpu.arguments import KernelArgumentError

EIGHT_BITS = tuple(LARGEST)


def expected(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = x.float().abs().amax(dim=1) / LARGEST[dtype]
    scales[scales == 0] = 1
    values = x.float() / scales[:, None]
    return (values.round() if dtype is torch.int8 else values).to(dtype), scales


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("floats", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_those_of_torch(floats: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 600, dtype=floats) * 30
    x[2] = 0
    x[3, ::2] = 0
    x[4] *= 1e-3
    x[5] = torch.arange(600) - 300  # many halves between two integers
    values, scales = quantize_tokens(x, dtype)
    wanted, wanted_scales = expected(x, dtype)
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_nan_reaches_the_scale(dtype: torch.dtype) -> None:
    x = torch.ones(2, 40)
    x[1, 7] = torch.nan
    _, scales = quantize_tokens(x, dtype)
    assert scales.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_a_scale_is_never_0(dtype: torch.dtype) -> None:
    x = torch.full((1, 40), 1e-45)  # the smallest float32: a part of it is 0
    values, scales = quantize_tokens(x, dtype)
    assert scales.tolist() == [1]
    assert values.float().count_nonzero() == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match=r"x is \[3\]"):
        quantize_tokens(torch.ones(3), torch.int8)
    with pytest.raises(KernelArgumentError, match="not contiguous"):
        quantize_tokens(torch.ones(4, 3).T, torch.int8)
    with pytest.raises(KernelArgumentError, match=r"x is torch\.int32"):
        quantize_tokens(torch.ones(3, 4, dtype=torch.int32), torch.int8)
    with pytest.raises(KernelArgumentError, match=r"dtype is torch\.uint8"):
        quantize_tokens(torch.ones(3, 4), torch.uint8)
