"""A matrix in float32 or bfloat16 that the C++ kernel multiplies.

Weights lie in panels of 32 output channels and are summed in float32, each result in the order of
its input features: a row is the same to the bit in every batch, with any number of threads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.linear import floating
from pagewire.kernels.native_library import DTYPE_CODES, NativeLibrary
from pagewire.kernels.ops import Activation

DTYPES = (torch.float32, torch.bfloat16)  # of weights

PANEL = 32  # output channels, in two halves


def native_linear(
    weight: Tensor, bias: Tensor | None, *, out_dtype: torch.dtype, library: NativeLibrary
) -> "NativeLinear":
    """Copy a matrix into the layout of the kernel.

    weight: one of DTYPES, [out_features, in_features]; bias: [out_features]. The result gives
    `out_dtype`: that of the weights, or float32. Raises ValueError for other dtypes.
    """
    if weight.dtype not in DTYPES or out_dtype not in (weight.dtype, torch.float32):
        raise ValueError(
            f"weights are {weight.dtype} and results {out_dtype}; weights must be one of "
            f"{', '.join(map(str, DTYPES))}, and results have their dtype or float32"
        )
    out_features, in_features = weight.shape
    padding = -out_features % PANEL
    padded_bias = torch.zeros(out_features + padding)
    if bias is not None:
        padded_bias[:out_features] = bias
    return NativeLinear(
        weight=_packed(F.pad(weight, (0, 0, 0, padding)) if padding else weight),
        bias=padded_bias,
        in_features=in_features,
        out_features=out_features,
        out_dtype=out_dtype,
        library=library,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NativeLinear:
    """Implements `pagewire.kernels.ops.Linear` with kernels/cpu/linear_float.cpp."""

    weight: Tensor  # float32 [num_panels, in_features, 32], bfloat16 [.., 16, 2]
    bias: Tensor  # float32 [num_panels * 32]
    in_features: int
    out_features: int
    out_dtype: torch.dtype
    library: NativeLibrary

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: Activation) -> Tensor:
        """As `Linear`. Raises ValueError for an x of another dtype or number of features."""
        x = floating(x)
        num_tokens, in_features = x.shape
        if in_features != self.in_features or x.dtype != self.weight.dtype:
            raise ValueError(
                f"x has {in_features} features of {x.dtype}; the matrix takes "
                f"{self.in_features} of {self.weight.dtype}"
            )
        x = x.contiguous()
        out = torch.empty(num_tokens, self.out_features, dtype=self.out_dtype)
        if num_tokens:
            self.library.functions.linear_float(
                DTYPE_CODES[x.dtype],
                DTYPE_CODES[self.out_dtype],
                x.data_ptr(),
                self.weight.data_ptr(),
                self.bias.data_ptr(),
                out.data_ptr(),
                num_tokens,
                in_features,
                self.out_features,
            )
        return out


def _packed(weight: Tensor) -> Tensor:
    """From [num_panels * 32, in_features] to the layout of NativeLinear."""
    if weight.dtype == torch.float32:
        return weight.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()
    # A channel of the first half beside its counterpart: the kernel widens 32 bits at a time.
    halves = weight.view(-1, 2, PANEL // 2, weight.shape[1])
    return halves.permute(0, 3, 2, 1).contiguous()
