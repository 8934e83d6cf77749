"""What a quantised matrix gives, where nothing multiplies its numbers: restored, in float32.

Slow, since every call restores all weights, and the same on any device: for accuracy, and for tests
of the kernels that do multiply them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels import fp8
from pagewire.kernels.linear import floating
from pagewire.kernels.ops import Activation
from pagewire.kernels.quantized_matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmulatedLinear:
    """Implements `pagewire.kernels.ops.Linear`."""

    matrices: tuple[QuantizedMatrix, ...]  # below one another
    bias: Tensor | None  # [out_features]
    dtype: torch.dtype  # of results
    fp8_activations: bool  # rounded to fp8, with a scale for each token

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        matrices = sum(matrix.num_bytes for matrix in self.matrices)
        return matrices + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activation) -> Tensor:
        x = floating(x).float()
        if self.fp8_activations:
            values, scales = fp8.quantize_rows(x)
            x = values.float() * scales
        out = F.linear(x, torch.cat([matrix.dequantized() for matrix in self.matrices]))
        if self.bias is not None:
            out += self.bias
        return out.to(self.dtype)
