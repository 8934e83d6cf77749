"""Products in floating point whose rows have the same bits in every batch, and against float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import TOLERANCE, assert_close
from torch import Tensor

from pagewire.kernels.float_linear import FloatKernel, float_linear
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.invariant_matmul import invariant_matmul
from pagewire.kernels.linear import DenseLinear

NUM_TOKENS = 75  # more than a tile of any dtype has


def inputs(num_tokens: int, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_tokens, num_inputs, generator=generator),
        torch.randn(num_outputs, num_inputs, generator=generator),
        torch.randn(num_outputs, generator=generator),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    # Parts of tiles in every dimension, several tiles, and a matrix of one row.
    [(3, 48, 40), (70, 130, 64), (1, 1, 200)],
    ids=str,
)
def test_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = (each.to(dtype) for each in inputs(*shape))
    expected = x.double() @ weight.double().T
    assert_close(invariant_matmul(x, weight, None, dtype=dtype), expected)
    out = invariant_matmul(x, weight, bias, dtype=torch.float32)
    assert out.dtype is torch.float32
    assert_close(out, expected + bias.double(), 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=6)
@given(start=st.integers(0, NUM_TOKENS - 1), length=st.integers(1, NUM_TOKENS))
def test_rows_are_the_same_in_every_batch(dtype: torch.dtype, start: int, length: int) -> None:
    """Whoever the others are, how many of them, and in which place of a tile a row lies."""
    x, weight, bias = (each.to(dtype) for each in inputs(NUM_TOKENS, 140, 150))
    together = invariant_matmul(x, weight, bias, dtype=torch.float32)
    part = invariant_matmul(x[start : start + length], weight, bias, dtype=torch.float32)
    assert torch.equal(part, together[start : start + length])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_that_overflow_leave_the_others_alone(dtype: torch.dtype) -> None:
    x, weight, bias = (each.to(dtype) for each in inputs(6, 40, 48))
    expected = invariant_matmul(x, weight, bias, dtype=dtype)
    x[1], x[4] = torch.nan, torch.inf
    out = invariant_matmul(x, weight, bias, dtype=dtype)
    kept = [0, 2, 3, 5]
    assert torch.equal(out[kept], expected[kept])
    assert out[1].isnan().all()


def test_a_matrix_that_it_multiplies() -> None:
    x, weight, bias = (each.half() for each in inputs(3, 20, 32))
    make = partial(float_linear, weight, bias, kernel=FloatKernel.TRITON, library=None)
    linear = make(out_dtype=torch.float32)
    assert isinstance(linear, DenseLinear) and linear.weight is weight
    assert torch.equal(linear(x), invariant_matmul(x, weight, bias, dtype=torch.float32))
    assert make(out_dtype=torch.float16)(x).dtype is torch.float16


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = inputs(2, 3, 32)
    multiply = partial(invariant_matmul, dtype=torch.float32)
    with pytest.raises(KernelArgumentError, match=r"x is torch\.int8"):
        multiply(x.to(torch.int8), weight, bias)
    with pytest.raises(KernelArgumentError, match=r"weight is \[3, 31\]; give \[any, 32\]"):
        multiply(x, weight[:, :31], bias)
    with pytest.raises(KernelArgumentError, match=r"weight is torch\.float16; give torch\.float32"):
        multiply(x, weight.half(), bias)
    with pytest.raises(KernelArgumentError, match=r"bias is \[2\]; give \[3\]"):
        multiply(x, weight, bias[:2])
    with pytest.raises(KernelArgumentError, match=r"dtype is torch\.int32"):
        invariant_matmul(x, weight, bias, dtype=torch.int32)
