"""Kernels with their result in 8 bits: to the bit what two kernels give one after another."""

import pytest
import torch

from pagewire.kernels.gpu.activation_quant import LARGEST, quantize_tokens
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.rms_norm import add_rms_norm, rms_norm
from pagewire.kernels.gpu.rms_norm_quant import add_rms_norm_quant, rms_norm_quant
from pagewire.kernels.gpu.silu_mul import silu_mul
from pagewire.kernels.gpu.silu_mul_quant import silu_mul_quant

EIGHT_BITS = tuple(LARGEST)
Quantized = tuple[torch.Tensor, torch.Tensor]


def assert_same(quantized: Quantized, expected: Quantized) -> None:
    assert torch.equal(quantized[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(quantized[1], expected[1])


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("floats", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(floats: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 4, 600, dtype=floats) * 5
    weight = torch.randn(600, dtype=floats)
    assert_same(
        rms_norm_quant(x, weight, 1e-5, dtype), quantize_tokens(rms_norm(x, weight, 1e-5), dtype)
    )
    normed, total = add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert_same(
        add_rms_norm_quant(x, residual, weight, 1e-5, dtype), quantize_tokens(normed, dtype)
    )
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("floats", [torch.float32, torch.bfloat16], ids=str)
def test_silu_mul(floats: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(4, 1200, dtype=floats) * 5
    assert_same(silu_mul_quant(gate_up, dtype), quantize_tokens(silu_mul(gate_up), dtype))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(KernelArgumentError, match=r"weight is \[7\]; give \[8\]"):
        rms_norm_quant(x, torch.ones(7), 1e-5, torch.int8)
    with pytest.raises(KernelArgumentError, match=r"residual is \[1, 8\]; give \[2, 8\]"):
        add_rms_norm_quant(x, torch.ones(1, 8), torch.ones(8), 1e-5, torch.int8)
    with pytest.raises(KernelArgumentError, match=r"dtype is torch\.int16"):
        silu_mul_quant(x, torch.int16)
    with pytest.raises(KernelArgumentError, match="gate_up has 7 columns"):
        silu_mul_quant(torch.ones(2, 7), torch.int8)
