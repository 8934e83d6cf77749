"""A matrix in 8 bits with a scale for each output, multiplied with activations of one a token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.gpu.fp8_matmul import fp8_matmul, takes_matrix
from pagewire.kernels.gpu.w8a8_matmul import w8a8_matmul
from pagewire.kernels.ops import Activation, TokenActivation
from pagewire.kernels.quantized_matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class W8A8Linear:
    """Implements `pagewire.kernels.ops.Linear`.

    Calls raise KernelArgumentError for activations of another size or dtype than the matrix'.
    """

    weight: Tensor  # int8 or float8_e4m3fn [out_features, in_features]
    scales: Tensor  # float32 [out_features]
    bias: Tensor | None  # [out_features]
    dtype: torch.dtype  # of results

    @property
    def takes_quantized(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.weight.nbytes + self.scales.nbytes + bias

    def __call__(self, x: Activation) -> Tensor:
        x = as_tokens(x)
        if takes_matrix(self.weight, self.dtype):
            out = fp8_matmul(x.values, x.scales, self.weight, self.scales)
        else:
            out = w8a8_matmul(x.values, x.scales, self.weight, self.scales, self.dtype)
        return out if self.bias is None else out.add_(self.bias)


def w8a8_linear(
    matrices: Sequence[QuantizedMatrix], bias: Tensor | None, dtype: torch.dtype, device: str
) -> W8A8Linear:
    """The matrices below one another; `w8a8.has_scale_per_output` is true of each."""
    return W8A8Linear(
        weight=torch.cat([matrix.quants.to(device) for matrix in matrices]),
        scales=torch.cat([matrix.scales[:, 0].to(device).float() for matrix in matrices]),
        bias=bias,
        dtype=dtype,
    )


def as_tokens(x: Activation) -> TokenActivation:
    """x as matrices in 8 bits take it. Raises TypeError for another activation."""
    if not isinstance(x, TokenActivation):
        raise TypeError("a matrix in 8 bits takes a TokenActivation; see Ops.quantize")
    return x
