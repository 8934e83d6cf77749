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
from pagewire.kernels.quantized_linears import QuantizedLinears, quantize_weight
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


@pytest.mark.parametrize("numbers", w8a8.DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [4, 100])  # small tiles, and large ones
def test_experts_in_one_product_or_one_after_another(num_tokens: int, numbers: torch.dtype) -> None:
    """Expert 1 has no token."""
    torch.manual_seed(0)
    gate_up = [quantize_weight(randn(64, 32) / 6, numbers) for _ in range(3)]
    down = [quantize_weight(randn(32, 32) / 6, numbers) for _ in range(3)]
    ops = ops_of(numbers)

    def linears(of: QuantizedLinears) -> tuple[tuple[Linear, ...], ...]:
        return tuple(
            tuple(of.linear([each], None, torch.float32) for each in matrices)
            for matrices in (gate_up, down)
        )

    together = TRITON.experts(*linears(TRITON))
    sorted_, emulated = (
        SortedExperts(gate_up=matrices[0], down=matrices[1], ops=ops)
        for matrices in (linears(TRITON), linears(EMULATED))
    )
    x = randn(num_tokens, 32)
    chosen = torch.tensor([[0, 2], [2, 0]]).repeat(num_tokens // 2, 1)
    routing = Routing(experts=chosen, weights=torch.rand(num_tokens, 2))
    quantized = ops.quantize(x)
    expected = emulated(x, routing).double()
    for experts in (together, sorted_):
        # What lies at the border of two steps of 8 bits may be rounded to either.
        assert_close(experts(quantized, routing), expected, 1e-2)
    assert together.takes_quantized
    assert together.num_bytes == sorted_.num_bytes
