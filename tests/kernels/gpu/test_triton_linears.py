"""Quantised matrices of a GPU: that they give what plain torch emulates, to rounding."""

import pytest
import torch
from paged_case import TOLERANCE, assert_close
from torch import Tensor

from pagewire.kernels import w4a16, w8a8
from pagewire.kernels.emulated_linear import EmulatedLinears
from pagewire.kernels.experts import Routing
from pagewire.kernels.gpu.triton_linears import TritonLinears
from pagewire.kernels.ops import Activation, Linear
from pagewire.kernels.quantized import quantize
from pagewire.kernels.quantized_linears import quantize_weight
from pagewire.kernels.quantized_matrix import QuantizedMatrix, consecutive_groups
from pagewire.kernels.sorted_experts import SortedExperts
from pagewire.kernels.triton_ops import TritonOps, find_gpu

NUMBERS = (*w8a8.DTYPES, w4a16.DTYPE)
EMULATED = EmulatedLinears(dtypes=NUMBERS)
TRITON = TritonLinears(device="cpu", dtypes=NUMBERS)


def ops_of(numbers: torch.dtype) -> TritonOps:
    return TritonOps(find_gpu("cpu"), activations=numbers if numbers in w8a8.DTYPES else torch.int8)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def activation(x: Tensor, linear: Linear, numbers: torch.dtype) -> Activation:
    """x as the matrix takes it."""
    return ops_of(numbers).quantize(x) if linear.takes_quantized else x


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_features", [128, 200])  # whole groups, and one that is filled up
def test_the_emulation_computes_what_the_kernels_do(
    in_features: int, dtype: torch.dtype, numbers: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, bias = randn(5, in_features, dtype=dtype), randn(48, dtype=dtype)
    matrices = [quantize_weight(randn(rows, in_features), numbers) for rows in (32, 16)]
    linear, emulated = (each.linear(matrices, bias, dtype) for each in (TRITON, EMULATED))
    assert linear.takes_quantized == (numbers in w8a8.DTYPES)
    out = linear(activation(x, linear, numbers))
    expected = emulated(x)
    assert out.dtype == expected.dtype == dtype
    # Sums have another order, after which both results are rounded, and rounded with the bias.
    assert_close(out, expected.double(), 3e-6 if dtype is torch.float32 else TOLERANCE[dtype])


def test_zeros_and_scales_of_any_floating_dtype_and_group() -> None:
    """Groups of 256 inputs, and no zeros."""
    torch.manual_seed(0)
    matrix = QuantizedMatrix(
        quants=torch.randint(0, 16, (24, 512), dtype=torch.uint8),
        scales=torch.rand(24, 2).bfloat16(),
        zeros=None,
        group_of=consecutive_groups(512, 256),
    )
    x = randn(3, 512)
    out = TRITON.linear([matrix], None, torch.float32)(x)
    assert_close(out, x.double() @ matrix.dequantized().double().T)


def test_an_activation_of_another_kind_is_refused() -> None:
    x = randn(2, 32)
    for numbers in w8a8.DTYPES:
        linear = TRITON.linear([quantize_weight(randn(16, 32), numbers)], None, torch.float32)
        for wrong in (x, quantize(x)):
            with pytest.raises(TypeError, match="takes a TokenActivation"):
                linear(wrong)
    linear = TRITON.linear([quantize_weight(randn(16, 32), w4a16.DTYPE)], None, torch.float32)
    with pytest.raises(TypeError, match="takes no quantised activation"):
        linear(ops_of(torch.int8).quantize(x))


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_memory_is_what_tensors_take(numbers: torch.dtype) -> None:
    matrix = quantize_weight(randn(16, 128), numbers)
    linear = TRITON.linear([matrix], torch.zeros(16), torch.float32)
    scales = 16 * 4 if numbers in w8a8.DTYPES else 16 * (2 + 1)
    weights = 16 * 128 if numbers in w8a8.DTYPES else 16 * 64
    assert linear.num_bytes == weights + scales + 16 * 4


def test_experts_one_after_another_take_tokens_in_8_bits() -> None:
    torch.manual_seed(0)
    gate_up = [quantize_weight(randn(64, 32) / 6, torch.int8) for _ in range(3)]
    down = [quantize_weight(randn(32, 32) / 6, torch.int8) for _ in range(3)]
    ops = ops_of(torch.int8)
    experts, expected = (
        SortedExperts(
            gate_up=tuple(linears.linear([each], None, torch.float32) for each in gate_up),
            down=tuple(linears.linear([each], None, torch.float32) for each in down),
            ops=ops,
        )
        for linears in (TRITON, EMULATED)
    )
    x = randn(4, 32)
    routing = Routing(
        experts=torch.tensor([[0, 2], [2, 1], [1, 2], [2, 0]]), weights=torch.rand(4, 2)
    )
    assert_close(experts(ops.quantize(x), routing), expected(x, routing).double(), 1e-2)
