"""W8A8: weights in 8 bits with a scale per output channel, activations with one per token.

The C++ kernel reads the weights in panels of 16 channels and applies both scales and the bias while
the sums are still in registers. Without it oneDNN multiplies and torch scales.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.native_library import DTYPE_CODES, NativeLibrary
from pagewire.kernels.ops import Activation, Linear
from pagewire.kernels.quantized import PANEL, padded_bias, quantized

_GROUP = 4  # input features that the kernel multiplies in one instruction
_OFFSET = 128  # makes weights unsigned


def int8_linear(
    weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, library: NativeLibrary | None
) -> Linear:
    """Quantise a matrix symmetrically per output channel.

    weight: [out_features, in_features], of any floating dtype; bias: [out_features]. The result
    gives `dtype`, with the C++ kernel where there is a library.
    """
    values, scales = quantize_weight(weight)
    if library is None:
        return TorchInt8Linear(weight=values.T, scales=scales, bias=bias, dtype=dtype)
    return NativeInt8Linear(
        weight=_packed(values),
        scales=F.pad(scales, (0, -len(scales) % PANEL)),
        bias=padded_bias(bias, len(values)),
        in_features=values.shape[1],
        out_features=len(values),
        dtype=dtype,
        library=library,
    )


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out_features, in_features] and float32 [out_features]; 1 for a channel of zeros."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / 127
    scales.masked_fill_(scales == 0, 1)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TorchInt8Linear:
    """Implements `pagewire.kernels.ops.Linear` with oneDNN's integer product."""

    weight: Tensor  # int8 [in_features, out_features], a view: output channels lie apart
    scales: Tensor  # float32 [out_features]
    bias: Tensor | None  # [out_features]
    dtype: torch.dtype

    @property
    def takes_quantized(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        return (
            self.weight.nbytes
            + self.scales.nbytes
            + (self.bias.nbytes if self.bias is not None else 0)
        )

    def __call__(self, x: Activation) -> Tensor:
        x = quantized(x)
        sums = torch._int_mm(x.values, self.weight)  # int32 [num_tokens, out_features]
        out = sums.float().mul_(self.scales).mul_(x.scales[:, None])
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NativeInt8Linear:
    """Implements `pagewire.kernels.ops.Linear` with kernels/cpu/linear_int8.cpp."""

    weight: Tensor  # uint8 [num_panels, in_features / 4, 16, 4], offset by 128
    scales: Tensor  # float32 [num_panels * 16]
    bias: Tensor  # float32 [num_panels * 16]
    in_features: int  # a multiple of 4
    out_features: int
    dtype: torch.dtype
    library: NativeLibrary

    @property
    def takes_quantized(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + self.bias.nbytes

    def __call__(self, x: Activation) -> Tensor:
        x = quantized(x)
        num_tokens, in_features = x.values.shape
        if in_features != self.in_features:
            raise ValueError(f"x has {in_features} features; the matrix takes {self.in_features}")
        values = x.values.contiguous()
        out = torch.empty(num_tokens, self.out_features, dtype=self.dtype)
        self.library.functions.linear_int8(
            DTYPE_CODES[self.dtype],
            values.data_ptr(),
            x.scales.data_ptr(),
            self.weight.data_ptr(),
            self.scales.data_ptr(),
            self.bias.data_ptr(),
            out.data_ptr(),
            num_tokens,
            in_features,
            self.out_features,
        )
        return out


def _packed(values: Tensor) -> Tensor:
    """int8 [out_features, in_features] to uint8 [num_panels, in_features / 4, 16, 4]."""
    out_features, in_features = values.shape
    if in_features % _GROUP:
        raise ValueError(f"in_features is {in_features}; it must be a multiple of {_GROUP}")
    unsigned = (values.to(torch.int16) + _OFFSET).to(torch.uint8)
    rows = F.pad(unsigned, (0, 0, 0, -out_features % PANEL), value=_OFFSET)
    panels = rows.view(-1, PANEL, in_features // _GROUP, _GROUP)
    return panels.transpose(1, 2).contiguous()
