"""A matrix that oneDNN stores as it multiplies it fastest.

For bfloat16 on CPUs that multiply it in hardware: `F.linear` would lay the weights out anew in
every call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.linear import floating
from pagewire.kernels.ops import Activation


def has_onednn() -> bool:
    """Whether torch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def onednn_linear(weight: Tensor, bias: Tensor | None) -> "OneDnnLinear":
    """Copy a matrix into oneDNN's layout.

    weight: [out_features, in_features] and bias: [out_features], both in the dtype of the
    activations. Needs `has_onednn()`.
    """
    return OneDnnLinear(weight=torch.ops.mkldnn._reorder_linear_weight(weight), bias=bias)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OneDnnLinear:
    """Implements `pagewire.kernels.ops.Linear` with oneDNN's prepacked weights."""

    weight: Tensor  # [out_features, in_features], of oneDNN's own layout
    bias: Tensor | None  # [out_features]

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Activation) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            floating(x), self.weight, self.bias, "none", [], ""
        )
        return out
