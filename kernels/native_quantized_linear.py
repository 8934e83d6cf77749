"""A quantised matrix as the C++ kernels multiply it, in 8 or in 4 bits.

A panel is 16 output channels side by side. Each group of 32 input features of a panel is one run of
memory, read from its start to its end: quants, scales, minima (kernels/cpu/quantized_tile.h).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.native_library import DTYPE_CODES, NativeLibrary
from pagewire.kernels.ops import GROUP, Activation
from pagewire.kernels.quantized import as_quantized

_PANEL = 16  # output channels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NativeQuantizedLinear:
    """Implements `pagewire.kernels.ops.Linear`."""

    bits: Literal[4, 8]
    groups: Tensor  # uint8 [num_panels, num_groups, group_bytes], see `packed`
    bias: Tensor  # float32 [num_panels * 16]
    in_features: int
    out_features: int
    dtype: torch.dtype
    library: NativeLibrary

    @property
    def takes_quantized(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        return self.groups.nbytes + self.bias.nbytes

    def __call__(self, x: Activation) -> Tensor:
        x = as_quantized(x, self.in_features)
        functions = self.library.functions
        multiply = functions.linear_int8 if self.bits == 8 else functions.linear_int4
        num_tokens, num_groups, _ = x.groups.shape
        values = x.groups.contiguous()
        out = torch.empty(num_tokens, self.out_features, dtype=self.dtype)
        multiply(
            DTYPE_CODES[self.dtype],
            values.data_ptr(),
            self.groups.data_ptr(),
            self.bias.data_ptr(),
            out.data_ptr(),
            num_tokens,
            num_groups,
            self.out_features,
        )
        return out


def packed(quants: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Lay a matrix out in panels; channels behind the last one are 0.

    quants: uint8 [out_features, num_groups, bytes], of 4 features' bytes (8 bits) or of 8 features'
    halves (4 bits) a step; scales and minima: float16 [out_features, num_groups]. Returns uint8
    [num_panels, num_groups, 16 * bytes + 64].
    """
    steps = quants.contiguous().view(torch.int32)  # [out_features, num_groups, bytes / 4]
    parts = (steps, scales[..., None], minima[..., None])
    return torch.cat([_in_panels(part).view(torch.uint8) for part in parts], dim=2)


def quantized_panels(weight: Tensor, library: NativeLibrary) -> Tensor:
    """Quantise a matrix to 8 bits, in the layout of `packed`.

    weight: [out_features, in_features], of a dtype of DTYPE_CODES.
    """
    out_features, in_features = weight.shape
    num_panels, num_groups = -(-out_features // _PANEL), -(-in_features // GROUP)
    groups = torch.empty(num_panels, num_groups, _PANEL * (GROUP + 4), dtype=torch.uint8)
    weight = weight.contiguous()
    library.functions.quantize_weight(
        DTYPE_CODES[weight.dtype], weight.data_ptr(), groups.data_ptr(), out_features, in_features
    )
    return groups


def _in_panels(parts: Tensor) -> Tensor:
    """[out_features, num_groups, n] to [num_panels, num_groups, n * 16], filled up with 0."""
    padding = -len(parts) % _PANEL
    if padding:
        parts = F.pad(parts, (0, 0, 0, 0, 0, padding))
    return parts.view(-1, _PANEL, *parts.shape[1:]).permute(0, 2, 3, 1).contiguous().flatten(2)


def padded_bias(bias: Tensor | None, out_features: int) -> Tensor:
    """float32 [out_features, filled up to whole panels with 0]; 0 without a bias."""
    padded = torch.zeros(-(-out_features // _PANEL) * _PANEL)
    if bias is not None:
        padded[:out_features] = bias
    return padded
