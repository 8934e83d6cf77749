"""Gives Triton's interpreter the narrow floats of a GPU: bfloat16 and 8 bits.

Triton 3.6 interprets them as the integers that hold their bits: a product of bfloat16 is wrong by
many orders of magnitude, and casts truncate and do not saturate. Here a value is widened to
float32, computed with, and rounded once, to even.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import (
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
    interpreter_builder,
)

Array = npt.NDArray[Any]
Ufunc = Callable[..., Array]

# The largest finite value, at which a GPU saturates when it casts.
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


@contextmanager
def exact_narrow_floats() -> Iterator[None]:
    """Until it is left, the interpreter computes in bfloat16 and casts to 8 bits as a GPU does.

    What stays wrong in these types raises TypeError: reductions in any of them, arithmetic in
    8 bits.
    """
    builder = InterpreterBuilder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", _cast(builder.cast_impl))
        patch.setattr(builder, "create_fp_to_fp", _convert(builder.create_fp_to_fp))
        patch.setattr(builder, "binary_op", _elementwise(builder.binary_op))
        patch.setattr(builder, "unary_op", _elementwise(builder.unary_op))
        patch.setattr(builder, "ternary_op", _elementwise(builder.ternary_op))
        patch.setattr(builder, "create_fma", _fma)
        patch.setattr(builder, "create_dot", _dot)
        patch.setattr(builder, "get_bf16", _bf16_constant, raising=False)
        patch.setitem(interpreter_builder.codegen_fns, "min_dot_size", _min_dot_size)
        patch.setattr(
            ReduceScanOpInterface, "check_tensor", _reducible(ReduceScanOpInterface.check_tensor)
        )
        yield


def _is_narrow(handle: TensorHandle) -> bool:
    return handle.dtype.scalar in _TORCH


def _widen(handle: TensorHandle) -> Array:
    """What a handle holds, float32 where that is narrow."""
    if not _is_narrow(handle):
        return np.asarray(handle.data)
    bits = np.array(handle.data)  # a copy: torch wants memory that it may write to
    signed = bits.view(np.int16 if bits.itemsize == 2 else np.uint8)
    return torch.from_numpy(signed).view(_TORCH[handle.dtype.scalar]).float().numpy()


def _narrow(values: Array, dtype: tl.dtype) -> TensorHandle:
    """`values` rounded to a narrow dtype: to even, and finite ones stay finite in 8 bits."""
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    if dtype in _LARGEST:
        wide = wide.clamp(-_LARGEST[dtype], _LARGEST[dtype])  # keeps NaN
    narrow: Tensor = wide.to(_TORCH[dtype])
    if dtype == tl.bfloat16:
        return TensorHandle(narrow.view(torch.int16).numpy().view(np.uint16), dtype)
    return TensorHandle(narrow.view(torch.uint8).numpy(), dtype)


def _cast(original: Any) -> Any:
    def cast(self: Any, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if _is_narrow(source):
            source = TensorHandle(_widen(source), tl.float32)
        if to.scalar in _TORCH:
            return _narrow(source.data, to.scalar)
        return original(self, source, to)

    return cast


def _convert(original: Any) -> Any:
    """Of casts between floats of which one has 8 bits."""

    def convert(self: Any, source: TensorHandle, to: tl.dtype, rounding: Any) -> TensorHandle:
        if _is_narrow(source) or to.scalar in _TORCH:
            return self.cast_impl(source, to)
        return original(self, source, to, rounding)

    return convert


def _elementwise(original: Any) -> Any:
    def compute(self: Any, *arguments: Any) -> TensorHandle:
        *operands, ufunc = arguments
        if ufunc is np.where or ufunc in _BITWISE or not any(map(_is_narrow, operands)):
            return original(self, *arguments)
        _require_bfloat16(operands)
        return _rounded(ufunc(*map(_widen, operands)))

    return compute


def _fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    result = _widen(x) * _widen(y) + _widen(z)
    return _narrow(result, z.dtype.scalar) if _is_narrow(z) else TensorHandle(result, z.dtype)


def _dot(
    self: Any, a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *unused: Any
) -> TensorHandle:
    """Products of 16-bit and narrower floats are exact in the float32 that they are summed in."""
    wide = accumulator.data.dtype
    product = np.matmul(_widen(a).astype(wide), _widen(b).astype(wide))
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _min_dot_size(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    """(M, N, K) as Triton's backend for NVIDIA has it; the interpreter would take any."""
    return 1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16


def _bf16_constant(self: Any, value: float) -> TensorHandle:
    return _narrow(np.array([value], dtype=np.float32), tl.bfloat16)


def _reducible(original: Any) -> Any:
    def check(self: Any, operands: Any) -> None:
        original(self, operands)
        for operand in operands:
            if operand.dtype.scalar in _TORCH:
                raise TypeError(f"a reduction in {operand.dtype.scalar}: cast to float32 first")

    return check


def _rounded(result: Array) -> TensorHandle:
    """bfloat16, or what comparisons give."""
    return TensorHandle(result, tl.int1) if result.dtype == bool else _narrow(result, tl.bfloat16)


def _require_bfloat16(operands: list[TensorHandle]) -> None:
    for operand in operands:
        if operand.dtype.scalar in _LARGEST:
            raise TypeError(f"arithmetic in {operand.dtype.scalar}: cast to float32 first")
