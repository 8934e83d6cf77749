"""W4A8: the 4-bit blocks of a GGUF file as they are, activations in 8 bits.

A block is a group of 32 input features of one output channel with a float16 scale and minimum:
Q4_1, or Q4_0, whose minimum is -8 scales. Nothing is quantised again. Needs the C++ kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.native_library import NativeLibrary
from pagewire.kernels.native_quantized_linear import NativeQuantizedLinear, packed, padded_bias
from pagewire.kernels.ops import GROUP


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
) -> NativeQuantizedLinear:
    """Lay a matrix out for the kernel; bias: [out_features]. The result gives `dtype`."""
    out_features, num_blocks = blocks.scales.shape
    return NativeQuantizedLinear(
        bits=4,
        groups=packed(_by_step(blocks.quants), blocks.scales, blocks.minima),
        bias=padded_bias(bias, out_features),
        in_features=num_blocks * GROUP,
        out_features=out_features,
        dtype=dtype,
        library=library,
    )


def _by_step(quants: Tensor) -> Tensor:
    """Bytes of features i and i + 16 to bytes of features 8 n + i and 8 n + i + 4, i < 4."""
    runs = quants.view(*quants.shape[:2], 2, 2, 4)  # features 8 n + 4 m + i and 16 later: n, m, i
    even, odd = runs[..., 0, :], runs[..., 1, :]
    return torch.cat(((even & 15) | odd << 4, even >> 4 | (odd & 240)), dim=2).flatten(2)
