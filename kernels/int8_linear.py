"""W8A8: weights in 8 bits with a scale and a minimum per group of 32, activations in 8 bits.

The C++ kernel multiplies them as integers. Without it torch restores both and multiplies in
floating point: slower than a dense matrix, in a quarter of its memory.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.native_library import NativeLibrary
from pagewire.kernels.native_quantized_linear import (
    NativeQuantizedLinear,
    padded_bias,
    quantized_panels,
)
from pagewire.kernels.ops import GROUP, Activation, Linear
from pagewire.kernels.quantized import as_quantized, dequantize

_LEVELS = 255
_CHUNK = 1 << 16  # weights quantised at a time, so that they stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int8Groups:
    """A matrix in 8 bits: weight = quant * scale + minimum of its group.

    The last group of a channel is filled up with weights of 0.
    """

    quants: Tensor  # uint8 [out_features, num_groups, 32]
    scales: Tensor  # float16 [out_features, num_groups]
    minima: Tensor  # float16 [out_features, num_groups]

    def dequantized(self) -> Tensor:
        """float32 [out_features, num_groups * 32]."""
        scales, minima = self.scales.float()[..., None], self.minima.float()[..., None]
        return torch.addcmul(minima, self.quants.float(), scales).flatten(1)


def int8_linear(
    weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, library: NativeLibrary | None
) -> Linear:
    """Quantise a matrix; the result gives `dtype`, with the C++ kernel where there is a library.

    weight: [out_features, in_features], of any floating dtype; bias: [out_features].
    """
    out_features, in_features = weight.shape
    if library is None:
        groups = quantize_weight(weight)
        return TorchInt8Linear(groups=groups, bias=bias, in_features=in_features, dtype=dtype)
    return NativeQuantizedLinear(
        bits=8,
        groups=quantized_panels(weight, library),
        bias=padded_bias(bias, out_features),
        in_features=in_features,
        out_features=out_features,
        dtype=dtype,
        library=library,
    )


def quantize_weight(weight: Tensor) -> Int8Groups:
    """Round each weight to one of 256 levels of its group.

    The levels lie between the smallest and the largest weight, or symmetrically around 0, whichever
    loses less: so what a file stores in blocks of Q4_1 or Q8_0 keeps its values. The reference of
    `quantized_panels`.
    """
    rows = max(1, _CHUNK // weight.shape[1])
    chunks = [_quantize(chunk) for chunk in torch.split(weight, rows)]
    quants, scales, minima = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Int8Groups(quants=quants, scales=scales, minima=minima)


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quants, scales and minima of a few channels, as Int8Groups has them."""
    padded = F.pad(weight.float(), (0, -weight.shape[1] % GROUP))
    groups = padded.view(len(weight), -1, GROUP)
    low, high = groups.aminmax(dim=-1)  # [out_features, num_groups]
    symmetric = (torch.maximum(-low, high) / 127).half()
    # Of both candidates: [2, out_features, num_groups].
    scales = torch.stack((((high - low) / _LEVELS).half(), symmetric))
    minima = torch.stack((low.half(), symmetric * -128))
    steps, starts = scales.float()[..., None], minima.float()[..., None]
    quants = ((groups - starts) / steps.masked_fill(steps == 0, 1)).round_().clamp_(0, _LEVELS)
    first, second = _sum_by_halves(torch.addcmul(starts, quants, steps).sub_(groups).square_())
    second_is_better = second < first
    return (
        torch.where(second_is_better[..., None], quants[1], quants[0]).to(torch.uint8),
        torch.where(second_is_better, scales[1], scales[0]),
        torch.where(second_is_better, minima[1], minima[0]),
    )


def _sum_by_halves(values: Tensor) -> Tensor:
    """Over the last dimension, of a power of 2, in an order of additions that C++ has as well."""
    while values.shape[-1] > 1:
        low, high = values.chunk(2, dim=-1)
        values = low + high
    return values[..., 0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TorchInt8Linear:
    """Implements `pagewire.kernels.ops.Linear` without integer products."""

    groups: Int8Groups
    bias: Tensor | None  # [out_features]
    in_features: int
    dtype: torch.dtype

    @property
    def takes_quantized(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        parts = (self.groups.quants, self.groups.scales, self.groups.minima, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Activation) -> Tensor:
        x = as_quantized(x, self.in_features)
        weight = self.groups.dequantized()[:, : self.in_features]
        out = F.linear(dequantize(x), weight)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(self.dtype)
