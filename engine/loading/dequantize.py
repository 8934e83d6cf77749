"""GGUF's quantised blocks to floating point.

The types of the small models that start in a second are done here, in torch and straight from the
mapped file; all others by the `gguf` library, several times slower. Both give the same numbers.
"""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Storage
from pagewire.engine.loading.gguf_header import TensorEntry
from pagewire.kernels.int4_linear import Int4Blocks
from pagewire.kernels.ops import GROUP

_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_LIBRARY = (
    Type.Q5_0,
    Type.Q5_1,
    Type.Q2_K,
    Type.Q3_K,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
)
INT4 = (Type.Q4_0, Type.Q4_1)
SUPPORTED = (*_PLAIN, *INT4, Type.Q8_0, *_LIBRARY)


def storage_of(entry: TensorEntry) -> Storage:
    if entry.type in _PLAIN:
        return Storage.FLOAT
    return Storage.INT4 if entry.type in INT4 else Storage.QUANTIZED


def dequantize(raw: Tensor, entry: TensorEntry) -> Tensor:
    """The values of one tensor, in its shape; float32 unless the file has a plain type.

    raw: uint8 [entry.num_bytes]. Raises ModelError for a type that is not supported.
    """
    match entry.type:
        case kind if kind in _PLAIN:
            values = raw.view(_PLAIN[kind])
        case Type.Q4_0:
            values = _q4_0(raw.view(-1, 18))
        case Type.Q4_1:
            values = _q4_1(raw.view(-1, 20))
        case Type.Q8_0:
            values = _q8_0(raw.view(-1, 34))
        case kind if kind in _LIBRARY:
            rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = raw.numpy()
            values = torch.from_numpy(gguf.dequantize(rows, kind))
        case kind:
            supported = ", ".join(supported.name for supported in SUPPORTED)
            raise ModelError(f"is of type {kind.name}; supported are {supported}")
    return values.view(entry.shape)


def int4_blocks(raw: Tensor, entry: TensorEntry) -> Int4Blocks:
    """The blocks of a matrix of type Q4_0 or Q4_1, unchanged; raw: uint8 [entry.num_bytes]."""
    rows, columns = entry.shape
    blocks = raw.view(rows, columns // GROUP, -1)
    scales = _halves(blocks, 0)
    if entry.type == Type.Q4_0:
        return Int4Blocks(quants=blocks[..., 2:], scales=scales, minima=scales * -8)
    return Int4Blocks(quants=blocks[..., 4:], scales=scales, minima=_halves(blocks, 2))


def _q4_0(blocks: Tensor) -> Tensor:
    """[num_blocks, 18]: a float16 scale, 16 bytes of two 4-bit numbers, offset by 8."""
    return (_nibbles(blocks[:, 2:]) - 8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    """[num_blocks, 20]: a float16 scale, a float16 minimum, 16 bytes of two 4-bit numbers."""
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    """[num_blocks, 34]: a float16 scale, 32 signed bytes."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _nibbles(packed: Tensor) -> Tensor:
    """float32 [num_blocks, 32]: the low halves of the 16 bytes, then the high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=1).float()


def _half(blocks: Tensor, at: int) -> Tensor:
    """float32 [num_blocks, 1]: the float16 at byte `at` of each block."""
    return _halves(blocks, at)[:, None].float()


def _halves(blocks: Tensor, at: int) -> Tensor:
    """float16 [...]: the one at byte `at` of each block; blocks: uint8 [..., block_bytes]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]
