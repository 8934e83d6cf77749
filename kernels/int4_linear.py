"""W4A8: the 4-bit blocks of a GGUF file as they are, activations in 8 bits with a scale per token.

A block is 32 input features of one output channel with a float16 scale and minimum: Q4_1, or Q4_0,
whose minimum is -8 scales. Nothing is quantised again. Needs the C++ kernel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.native_library import DTYPE_CODES, NativeLibrary
from pagewire.kernels.ops import Activation
from pagewire.kernels.quantized import PANEL, padded_bias, quantized

BLOCK = 32  # input features

_STEPS, _GROUP = 4, 4  # a step of the kernel takes four features from each half of a block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int4Blocks:
    """A matrix in 4 bits: weight = quant * scale + minimum of its block."""

    quants: Tensor  # uint8 [out_features, num_blocks, 16]: features 0-15 low, 16-31 high halves
    scales: Tensor  # float16 [out_features, num_blocks]
    minima: Tensor  # float16 [out_features, num_blocks]


def concatenated(parts: list[Int4Blocks]) -> Int4Blocks:
    """The matrices below one another, their outputs behind one another."""
    return Int4Blocks(
        quants=torch.cat([part.quants for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        minima=torch.cat([part.minima for part in parts]),
    )


def int4_linear(
    blocks: Int4Blocks, bias: Tensor | None, *, dtype: torch.dtype, library: NativeLibrary
) -> "Int4Linear":
    """Lay a matrix out for the kernel; bias: [out_features]. The result gives `dtype`."""
    out_features, num_blocks = blocks.scales.shape
    return Int4Linear(
        blocks=_packed(blocks),
        bias=padded_bias(bias, out_features),
        in_features=num_blocks * BLOCK,
        out_features=out_features,
        dtype=dtype,
        library=library,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int4Linear:
    """Implements `pagewire.kernels.ops.Linear` with kernels/cpu/linear_int4.cpp."""

    blocks: Tensor  # uint8 [num_panels, num_blocks, 320]: quants, scales and minima of 16 channels
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
        return self.blocks.nbytes + self.bias.nbytes

    def __call__(self, x: Activation) -> Tensor:
        x = quantized(x)
        num_tokens, in_features = x.values.shape
        if in_features != self.in_features:
            raise ValueError(f"x has {in_features} features; the matrix takes {self.in_features}")
        values = x.values.contiguous()
        out = torch.empty(num_tokens, self.out_features, dtype=self.dtype)
        self.library.functions.linear_int4(
            DTYPE_CODES[self.dtype],
            values.data_ptr(),
            x.scales.data_ptr(),
            self.blocks.data_ptr(),
            self.bias.data_ptr(),
            out.data_ptr(),
            num_tokens,
            in_features,
            self.out_features,
        )
        return out


def _packed(blocks: Int4Blocks) -> Tensor:
    """uint8 [num_panels, num_blocks, 320]; channels behind the last one are 0."""
    padding = -len(blocks.scales) % PANEL
    num_blocks = blocks.scales.shape[1]
    quants = F.pad(blocks.quants, (0, 0, 0, 0, 0, padding))
    by_step = quants.view(-1, PANEL, num_blocks, _STEPS, _GROUP).permute(0, 2, 3, 1, 4)
    parts = [by_step.reshape(len(by_step), num_blocks, -1)]
    for halves in (blocks.scales, blocks.minima):
        rows = F.pad(halves.view(torch.int16), (0, 0, 0, padding)).view(-1, PANEL, num_blocks)
        parts.append(rows.transpose(1, 2).contiguous().view(torch.uint8))
    return torch.cat(parts, dim=2)
