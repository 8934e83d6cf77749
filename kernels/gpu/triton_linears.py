"""The matrices in fewer bits of a GPU: W8A8 in int8 or float8, and W4A16."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels import w8a8
from pagewire.kernels.gpu.w4a16_linear import w4a16_linear
from pagewire.kernels.gpu.w8a8_experts import W8A8Experts, w8a8_experts
from pagewire.kernels.gpu.w8a8_linear import W8A8Linear, w8a8_linear
from pagewire.kernels.ops import Linear
from pagewire.kernels.quantized_matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonLinears:
    """Implements `pagewire.kernels.quantized_linears.QuantizedLinears`."""

    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def expert_dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for dtype in self.dtypes if dtype in w8a8.DTYPES)

    @property
    def emulated(self) -> bool:
        return False

    def linear(
        self, matrices: Sequence[QuantizedMatrix], bias: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        if matrices[0].quants.dtype in w8a8.DTYPES:
            return w8a8_linear(matrices, bias, dtype, self.device)
        return w4a16_linear(matrices, bias, self.device)

    def experts(self, gate_up: Sequence[Linear], down: Sequence[Linear]) -> W8A8Experts:
        return w8a8_experts(_in_8_bits(gate_up), _in_8_bits(down))


def _in_8_bits(linears: Sequence[Linear]) -> list[W8A8Linear]:
    """Those that `TritonLinears.linear` made of one of its `expert_dtypes`."""
    return [linear for linear in linears if isinstance(linear, W8A8Linear)]
