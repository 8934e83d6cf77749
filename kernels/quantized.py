"""What the quantised matrices have in common."""

import torch
from torch import Tensor

from pagewire.kernels.ops import Activation, QuantizedActivation

PANEL = 16  # output channels that the C++ kernels compute side by side


def quantized(x: Activation) -> QuantizedActivation:
    """x as a quantised matrix takes it. Raises TypeError for a Tensor."""
    if isinstance(x, Tensor):
        raise TypeError("a quantised matrix takes a QuantizedActivation; see Ops.quantize")
    return x


def padded_bias(bias: Tensor | None, out_features: int) -> Tensor:
    """float32 [out_features, filled up to whole panels with 0]; 0 without a bias."""
    padded = torch.zeros(-(-out_features // PANEL) * PANEL)
    if bias is not None:
        padded[:out_features] = bias
    return padded
