"""The product of activations in floats and a matrix in 4 bits, with a scale and a zero per group.

weight = (quant - zero) * scale (as GPTQ and AWQ have it; Frantar et al., 2022, Lin et al., 2023).
A group is 128 inputs of one output, one step of the sum; its byte i holds the quant of input i in
the low half and of input i + 64 in the high half. So each half of a tile of bytes is a tile of the
matrix, and no value has to change its place. A program does one tile of the output.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import FLOATS, require_array
from pagewire.kernels.gpu.matmul_tile import GROUP_TILES, Tile, choose_tile
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

GROUP = 128  # inputs that share a scale and a zero
_HALF: tl.constexpr = tl.constexpr(GROUP // 2)

_TILES = tuple(
    Tile(tokens=tokens, outputs=outputs, inputs=GROUP, launch=launch)
    for tokens, outputs, launch in (
        (16, 32, LaunchConfig(num_warps=4, num_stages=4)),
        (64, 128, LaunchConfig(num_warps=4, num_stages=3)),
        (128, 128, LaunchConfig(num_warps=8, num_stages=3)),
    )
)


def pack_int4(quants: Tensor) -> Tensor:
    """uint8 [num_outputs, num_inputs] of 0 .. 15 as the kernel reads it, half as wide.

    The last group is filled up with 0. Raises KernelArgumentError.
    """
    require_array("quants", quants, (None, None), torch.uint8)
    num_outputs, num_inputs = quants.shape
    groups = F.pad(quants, (0, -num_inputs % GROUP)).view(num_outputs, -1, 2, GROUP // 2)
    low, high = groups.unbind(dim=2)
    return torch.flatten(low | high << 4, 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _w4a16_matmul_kernel(
    x_ptr: tl.tensor,  # [num_tokens, num_inputs]
    weight_ptr: tl.tensor,  # uint8 [num_outputs, num_groups * 64]; num_groups of 128 inputs
    scales_ptr: tl.tensor,  # [num_groups, num_outputs]
    zeros_ptr: tl.tensor,  # uint8 [num_groups, num_outputs]
    out_ptr: tl.tensor,  # [num_tokens, num_outputs]
    num_tokens: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
) -> None:
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(0),
        tl.program_id(1),
        tl.num_programs(0),
        tl.num_programs(1),
        GROUP_TILES,
    )
    token = tile_m * TOKENS + tl.arange(0, TOKENS)
    output = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    has_token, has_output = token < num_tokens, output < num_outputs
    half = tl.arange(0, _HALF)
    num_groups = tl.cdiv(num_inputs, 2 * _HALF)
    x_at = x_ptr + token.to(tl.int64)[:, None] * num_inputs
    column = half
    weight_at = weight_ptr + output.to(tl.int64)[None, :] * (num_groups * _HALF) + half[:, None]
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for group in range(num_groups):
        packed = tl.load(weight_at, mask=has_output[None, :], other=0)  # [64, OUTPUTS]
        of_group = group * num_outputs + output
        scale = tl.load(scales_ptr + of_group, mask=has_output, other=0.0).to(tl.float32)[None, :]
        zero = tl.load(zeros_ptr + of_group, mask=has_output, other=0).to(tl.float32)[None, :]
        low = ((packed & 15).to(tl.float32) - zero) * scale
        high = ((packed >> 4).to(tl.float32) - zero) * scale
        inside = has_token[:, None] & (column < num_inputs)[None, :]
        x = tl.load(x_at + column[None, :], mask=inside, other=0.0)
        total = tl.dot(x, low.to(x.dtype), total, input_precision="ieee")
        column += _HALF
        inside = has_token[:, None] & (column < num_inputs)[None, :]
        x = tl.load(x_at + column[None, :], mask=inside, other=0.0)
        total = tl.dot(x, high.to(x.dtype), total, input_precision="ieee")
        column += _HALF
        weight_at += _HALF
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * num_outputs + output[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=has_token[:, None] & has_output[None, :],
    )


def w4a16_matmul(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """x @ ((quants - zeros) * scales)ᵀ in the dtype of x, [num_tokens, num_outputs].

    x: floating [num_tokens, num_inputs]; weight: uint8 [num_outputs, num_groups * GROUP / 2], as
    `pack_int4` makes it; scales: floating, zeros: uint8, both [num_groups, num_outputs]; all
    contiguous. Raises KernelArgumentError.
    """
    require_array("x", x, (None, None), *FLOATS)
    num_tokens, num_inputs = x.shape
    num_groups = triton.cdiv(num_inputs, GROUP)
    require_array("weight", weight, (None, num_groups * GROUP // 2), torch.uint8, device=x.device)
    num_outputs = len(weight)
    require_array("scales", scales, (num_groups, num_outputs), *FLOATS, device=x.device)
    require_array("zeros", zeros, (num_groups, num_outputs), torch.uint8, device=x.device)
    out = torch.empty((num_tokens, num_outputs), dtype=x.dtype, device=x.device)
    tile = choose_tile(_TILES, num_tokens)
    grid = (triton.cdiv(num_tokens, tile.tokens), triton.cdiv(num_outputs, tile.outputs))
    _w4a16_matmul_kernel[grid](
        x,
        weight,
        scales,
        zeros,
        out,
        num_tokens,
        num_outputs,
        num_inputs,
        tile.tokens,
        tile.outputs,
        GROUP_TILES,
        num_warps=tile.launch.num_warps,
        num_stages=tile.launch.num_stages,
    )
    return out


VARIANTS = tuple(
    Variant(
        name=f"w4a16_matmul bf16 {tile.name}",
        kernel=_w4a16_matmul_kernel,
        arguments={
            "x_ptr": "*bf16:16",
            "weight_ptr": "*u8:16",
            "scales_ptr": "*bf16:16",
            "zeros_ptr": "*u8:16",
            "out_ptr": "*bf16:16",
            "num_tokens": "i32",
            "num_outputs": "i32:16",
            "num_inputs": "i32:16",
        },
        constants={
            "TOKENS": tile.tokens,
            "OUTPUTS": tile.outputs,
            "GROUP_TILES": GROUP_TILES,
        },
        launch=tile.launch,
        requires=("HGMMA" if tile.tokens >= 64 else "HMMA",),
    )
    for tile in _TILES
)
