"""Which implementation multiplies matrices in floating point, and the matrix made for it."""

from enum import StrEnum
from functools import partial

import torch
from torch import Tensor

from pagewire.kernels.cpu_flags import has_bfloat16
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.native_library import NativeLibrary
from pagewire.kernels.native_linear import DTYPES, native_linear
from pagewire.kernels.onednn_linear import has_onednn, onednn_linear
from pagewire.kernels.ops import Linear
from pagewire.kernels.select import SelectedOps


class FloatKernel(StrEnum):
    """What multiplies matrices in floating point."""

    NATIVE = "C++"
    ONEDNN = "oneDNN"
    TRITON = "Triton"
    TORCH = "plain torch"


def choose_float_kernel(
    selected: SelectedOps, dtype: torch.dtype, device: str, *, flags: frozenset[str] | None = None
) -> FloatKernel:
    """The fastest that `selected` allows for a dtype and device.

    oneDNN for bfloat16 on a CPU with instructions for it, and torch on a GPU, unless results have
    to be deterministic: how they sum depends on the size of the batch. `flags` are the CPU's; None
    reads them from the operating system.
    """
    if selected.deterministic and selected.library is None:
        return FloatKernel.TRITON
    if device != "cpu":
        return FloatKernel.TORCH
    in_hardware = dtype == torch.bfloat16 and has_bfloat16(flags)
    if in_hardware and has_onednn() and not selected.deterministic:
        return FloatKernel.ONEDNN
    return FloatKernel.NATIVE if selected.library and dtype in DTYPES else FloatKernel.TORCH


def float_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    kernel: FloatKernel,
    library: NativeLibrary | None,
    out_dtype: torch.dtype,
) -> Linear:
    """A matrix for `kernel`, which needs a library where it is NATIVE.

    weight: [out_features, in_features]; bias: [out_features]. NATIVE and TRITON know `out_dtype`;
    the others give the dtype of the weights.
    """
    match kernel:
        case FloatKernel.NATIVE:
            assert library is not None
            return native_linear(weight, bias, out_dtype=out_dtype, library=library)
        case FloatKernel.ONEDNN:
            return onednn_linear(weight, bias)
        case FloatKernel.TRITON:
            # Only where it is wanted, as in `select`: Triton is not there on every platform.
            from pagewire.kernels.gpu.invariant_matmul import invariant_matmul

            product = partial(invariant_matmul, dtype=out_dtype)
            return DenseLinear(weight=weight, bias=bias, product=product)
        case FloatKernel.TORCH:
            return DenseLinear(weight=weight, bias=bias)
