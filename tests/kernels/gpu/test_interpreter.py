"""The interpreter that the other tests here rely on: narrow floats, and every lane's address."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def _cast_kernel(source: tl.tensor, target: tl.tensor, N: tl.constexpr) -> None:
    lanes = tl.arange(0, N)
    tl.store(target + lanes, tl.load(source + lanes).to(target.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, out: tl.tensor, less: tl.tensor, N: tl.constexpr
) -> None:
    lanes = tl.arange(0, N)
    x, y = tl.load(x_ptr + lanes), tl.load(y_ptr + lanes)
    tl.store(out + lanes, -x * y + tl.maximum(x, 1.5))
    tl.store(less + lanes, (x < y).to(tl.int32))


@triton.jit
def _dot_kernel(
    a: tl.tensor, b: tl.tensor, out: tl.tensor, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
) -> None:
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y))


@triton.jit
def _copy_kernel(source: tl.tensor, target: tl.tensor, count: tl.tensor, N: tl.constexpr) -> None:
    lanes = tl.arange(0, N)
    tl.store(target + lanes, tl.load(source + lanes, mask=lanes < count, other=0))


@triton.jit
def _sum_kernel(x: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, out, N=len(x))
    return out


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38, 1.00390625])


def test_bfloat16_is_rounded_to_even() -> None:
    x = torch.cat((torch.randn(504) * 100, SPECIAL))
    assert torch.equal(bits(cast(x, torch.bfloat16)), bits(x.bfloat16()))
    narrow = x.bfloat16()
    assert torch.equal(bits(cast(narrow, torch.float32)), bits(narrow.float()))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_rounded_and_saturates(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.cat((torch.randn(504) * 100, SPECIAL))
    for wide in (x, x.bfloat16()):
        expected = wide.float().clamp(-largest, largest).to(dtype)
        assert torch.equal(bits(cast(wide, dtype)), bits(expected))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_widens_to_what_it_stands_for(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert np.array_equal(cast(x, torch.float32).numpy(), x.float().numpy(), equal_nan=True)


def test_integers_and_bfloat16() -> None:
    x = torch.arange(-256, 256, dtype=torch.int32)
    assert torch.equal(cast(x, torch.bfloat16), x.bfloat16())
    assert torch.equal(cast(x.bfloat16(), torch.int32), x)


def test_arithmetic_in_bfloat16() -> None:
    x, y = torch.randn(2, 256).bfloat16()
    out, less = torch.empty_like(x), torch.empty(256, dtype=torch.int32)
    _arithmetic_kernel[(1,)](x, y, out, less, N=256)
    assert torch.equal(out, -x * y + torch.maximum(x, torch.tensor(1.5).bfloat16()))
    assert torch.equal(less, (x < y).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8])
def test_products_of_narrow_matrices(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, M=16, N=16, K=32)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_a_product_that_no_gpu_has_is_refused() -> None:
    a, b = torch.randn(16, 8).half(), torch.randn(8, 16).half()
    with pytest.raises(InterpreterError, match="K >= 16"):
        _dot_kernel[(1,)](a, b, torch.empty(16, 16), M=16, N=16, K=8)


def test_what_stays_wrong_is_refused() -> None:
    x = torch.randn(32)
    with pytest.raises(InterpreterError, match="reduction in bf16: cast to float32 first"):
        _sum_kernel[(1,)](x.bfloat16(), torch.empty(1), N=32)
    narrow = x.to(torch.float8_e5m2)
    with pytest.raises(InterpreterError, match="arithmetic in fp8e5: cast to float32 first"):
        _arithmetic_kernel[(1,)](narrow, narrow, torch.empty(32), torch.empty(32), N=32)


def test_one_lane_too_many_is_refused() -> None:
    source, target = torch.randn(32)[:16], torch.zeros(32)
    _copy_kernel[(1,)](source, target, 16, N=32)
    assert torch.equal(target[:16], source) and not target[16:].any()
    with pytest.raises(InterpreterError, match="load out of bounds in 1 of 17 lanes"):
        _copy_kernel[(1,)](source, target, 17, N=32)
    with pytest.raises(InterpreterError, match="store out of bounds in 1 of 32 lanes"):
        _copy_kernel[(1,)](source, target[:31], 16, N=32)


def test_tensors_of_an_earlier_kernel_are_out_of_bounds() -> None:
    memory = torch.zeros(64)
    _copy_kernel[(1,)](memory[:32], memory[32:], 32, N=32)
    with pytest.raises(InterpreterError, match="store out of bounds in 32 of 32 lanes"):
        _copy_kernel[(1,)](memory[:32], memory[64:], 32, N=32)
