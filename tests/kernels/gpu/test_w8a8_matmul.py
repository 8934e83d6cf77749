"""Products in 8 bits against float64, of what was quantised and of what it stands for."""

import pytest
import torch
from paged_case import assert_close

from pagewire.kernels.gpu.activation_quant import quantize_tokens
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.w8a8_matmul import w8a8_matmul

# Of the product of random numbers, once both are in 8 bits.
LOSS = {torch.int8: 2e-2, torch.float8_e4m3fn: 5e-2}


@pytest.mark.parametrize("dtype", LOSS, ids=str)
@pytest.mark.parametrize(
    ("shape", "out_dtype"),
    # One tile of each size and several, of which the last are not full.
    [
        ((3, 48, 160), torch.float32),
        ((60, 96, 200), torch.float16),
        ((150, 200, 300), torch.bfloat16),
    ],
    ids=str,
)
def test_product(shape: tuple[int, int, int], out_dtype: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, num_outputs, num_inputs = shape
    x, weight = torch.randn(num_tokens, num_inputs), torch.randn(num_outputs, num_inputs)
    quantized, scales = quantize_tokens(x, dtype)
    weight8, weight_scales = quantize_tokens(weight, dtype)
    out = w8a8_matmul(quantized, scales, weight8, weight_scales, out_dtype)
    restored = quantized.double() * scales[:, None]
    assert_close(out, restored @ (weight8.double() * weight_scales[:, None]).T)
    assert_close(out, x.double() @ weight.double().T, LOSS[dtype])


def test_sums_of_integers_are_exact() -> None:
    """Where float32 would round: 127 * 127 * 2048 is above 2^24."""
    x = torch.full((1, 2048), 127, dtype=torch.int8)
    weight = torch.full((16, 2048), 127, dtype=torch.int8)
    weight[:, 0] = 126
    ones = torch.ones(16)
    out = w8a8_matmul(x, ones[:1], weight, ones, torch.float32)
    assert out.tolist() == [[float(torch.tensor(127 * 127 * 2048 - 127.0))] * 16]


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(2, 32, dtype=torch.int8), torch.zeros(3, 32, dtype=torch.int8)
    ones = torch.ones(3)
    with pytest.raises(KernelArgumentError, match=r"x is torch\.float32"):
        w8a8_matmul(x.float(), ones[:2], weight, ones, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"weight is \[3, 31\]; give \[any, 32\]"):
        w8a8_matmul(x, ones[:2], weight[:, :31], ones, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"x_scales is \[3\]; give \[2\]"):
        w8a8_matmul(x, ones, weight, ones, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"dtype is torch\.int32"):
        w8a8_matmul(x, ones[:2], weight, ones, torch.int32)
