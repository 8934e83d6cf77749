"""A matrix in floating point, as every device can multiply it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.ops import Activation, QuantizedActivation

MatrixProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x weightᵀ + bias, if any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseLinear:
    """Implements `pagewire.kernels.ops.Linear` for any dtype and device."""

    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None = None  # [out_features]
    product: MatrixProduct = F.linear

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activation) -> Tensor:
        return self.product(floating(x), self.weight, self.bias)


def floating(x: Activation) -> Tensor:
    """x as a matrix in floating point takes it. Raises TypeError for a quantised one."""
    if isinstance(x, QuantizedActivation):
        raise TypeError("a matrix in floating point takes no quantised activation")
    return x
