"""A matrix in 4 bits with a scale and a zero for each group of inputs; activations in floats."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.gpu.w4a16_matmul import GROUP, pack_int4, w4a16_matmul
from pagewire.kernels.linear import floating
from pagewire.kernels.ops import Activation
from pagewire.kernels.quantized_matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class W4A16Linear:
    """Implements `pagewire.kernels.ops.Linear`; results are of the dtype of activations.

    Calls raise KernelArgumentError for activations of another size.
    """

    weight: Tensor  # uint8 [out_features, num_groups * GROUP / 2], as `pack_int4` makes it
    scales: Tensor  # floating point [num_groups, out_features]
    zeros: Tensor  # uint8 [num_groups, out_features]
    bias: Tensor | None  # [out_features]

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        parts = (self.weight, self.scales, self.zeros, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Activation) -> Tensor:
        out = w4a16_matmul(floating(x), self.weight, self.scales, self.zeros)
        return out if self.bias is None else out.add_(self.bias)


def w4a16_linear(
    matrices: Sequence[QuantizedMatrix], bias: Tensor | None, device: str
) -> W4A16Linear:
    """The matrices below one another; `w4a16.has_whole_groups` is true of each."""
    by_group = [_scales_and_zeros(matrix) for matrix in matrices]
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*by_group, strict=True))
    return W4A16Linear(
        weight=torch.cat([pack_int4(matrix.quants.to(device).contiguous()) for matrix in matrices]),
        scales=scales.to(device),
        zeros=zeros.to(device),
        bias=bias,
    )


def _scales_and_zeros(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """Of each run of GROUP inputs, [num_runs, out_features] both."""
    groups = matrix.group_of[::GROUP]
    scales = matrix.scales[:, groups].T.contiguous()
    if matrix.zeros is None:
        return scales, torch.zeros_like(scales, dtype=torch.uint8)
    return scales, matrix.zeros[:, groups].T.to(torch.uint8).contiguous()
