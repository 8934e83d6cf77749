"""What a quantised matrix of a GPU gives, where nothing multiplies its numbers, in float32.

Rounds what the kernels round, and sums in another order. Slow, since every call restores all
weights, and the same on any device: for accuracy, and for tests of the kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels import w8a8
from pagewire.kernels.linear import floating
from pagewire.kernels.ops import Activation, Linear
from pagewire.kernels.quantized_matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmulatedLinear:
    """Implements `pagewire.kernels.ops.Linear`.

    Matrices in 8 bits are multiplied with activations of the same dtype, W8A8; those in 4 bits are
    rounded to the dtype of activations, W4A16.
    """

    matrices: tuple[QuantizedMatrix, ...]  # below one another, all of one dtype
    bias: Tensor | None  # [out_features]
    dtype: torch.dtype  # of results

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        matrices = sum(matrix.num_bytes for matrix in self.matrices)
        return matrices + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activation) -> Tensor:
        x = floating(x)
        weight = torch.cat([matrix.dequantized() for matrix in self.matrices])
        quants = self.matrices[0].quants.dtype
        if quants in w8a8.DTYPES:
            values, scales = w8a8.quantize_rows(x, quants)
            out = F.linear(values.float(), weight) * scales[:, None]
        else:
            out = F.linear(x.float(), weight.to(x.dtype).float())
        out = out.to(self.dtype)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedLinears:
    """Implements `pagewire.kernels.quantized_linears.QuantizedLinears` on any device."""

    dtypes: tuple[torch.dtype, ...]

    @property
    def expert_dtypes(self) -> tuple[torch.dtype, ...]:
        return self.dtypes

    @property
    def emulated(self) -> bool:
        return True

    def linear(
        self, matrices: Sequence[QuantizedMatrix], bias: Tensor | None, dtype: torch.dtype
    ) -> EmulatedLinear:
        return EmulatedLinear(matrices=tuple(matrices), bias=bias, dtype=dtype)

    def experts(self, gate_up: Sequence[Linear], down: Sequence[Linear]) -> None:
        """One after another they are as slow."""
