"""The product of activations and a matrix that are both in 8 bits, with a scale a row of each.

out = (x wᵀ) * scale of the token * scale of the output feature: the integer (or float8) products
are summed by tensor cores, exactly in int32 (in float32), and scaled once at the end. A program
does one tile of the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.activation_quant import LARGEST
from pagewire.kernels.gpu.arguments import FLOATS, require, require_scaled_product
from pagewire.kernels.gpu.matmul_tile import GROUP_TILES, Tile, choose_tile
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

# For a decode step, which memory bounds, and for prefill.
_TILES = (
    Tile(tokens=16, outputs=64, inputs=128, launch=LaunchConfig(num_warps=4, num_stages=4)),
    Tile(tokens=64, outputs=128, inputs=128, launch=LaunchConfig(num_warps=4, num_stages=3)),
    Tile(tokens=128, outputs=128, inputs=128, launch=LaunchConfig(num_warps=8, num_stages=3)),
)
SUMS = {torch.int8: tl.int32, torch.float8_e4m3fn: tl.float32}  # dtype of sums of products


@triton.jit(do_not_specialize=["num_tokens"])
def _w8a8_matmul_kernel(
    x_ptr: tl.tensor,  # int8 or float8 e4m3 [num_tokens, num_inputs]
    x_scales_ptr: tl.tensor,  # float32 [num_tokens]
    weight_ptr: tl.tensor,  # of the same dtype [num_outputs, num_inputs]
    weight_scales_ptr: tl.tensor,  # float32 [num_outputs]
    out_ptr: tl.tensor,  # [num_tokens, num_outputs]
    num_tokens: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    SUM: tl.constexpr,  # dtype of the sum of products
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
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
    x_at = x_ptr + token.to(tl.int64)[:, None] * num_inputs
    weight_at = weight_ptr + output.to(tl.int64)[None, :] * num_inputs
    total = tl.zeros((TOKENS, OUTPUTS), SUM)
    for start in range(0, num_inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        inside = column < num_inputs
        x = tl.load(x_at + column[None, :], mask=has_token[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            weight_at + column[:, None], mask=inside[:, None] & has_output[None, :], other=0.0
        )
        # Hopper adds products of float8 to a few more bits than they have. Only those of one step:
        # the steps are added in float32.
        total = tl.dot(x, weight, total, out_dtype=SUM, max_num_imprecise_acc=INPUTS)
    x_scales = tl.load(x_scales_ptr + token, mask=has_token, other=0.0)
    weight_scales = tl.load(weight_scales_ptr + output, mask=has_output, other=0.0)
    out = total.to(tl.float32) * x_scales[:, None] * weight_scales[None, :]
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * num_outputs + output[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=has_token[:, None] & has_output[None, :],
    )


def w8a8_matmul(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """(x * x_scales) @ (weight * weight_scales)ᵀ in `dtype`, [num_tokens, num_outputs].

    x: int8 or float8_e4m3fn [num_tokens, num_inputs], weight: of the same dtype
    [num_outputs, num_inputs]; x_scales: float32 [num_tokens]; weight_scales: float32 [num_outputs];
    all contiguous. Raises KernelArgumentError.
    """
    require_scaled_product(x, x_scales, weight, weight_scales, *LARGEST)
    require(dtype in FLOATS, f"dtype is {dtype}; give one of {', '.join(map(str, FLOATS))}")
    num_tokens, num_inputs = x.shape
    num_outputs = len(weight)
    out = torch.empty((num_tokens, num_outputs), dtype=dtype, device=x.device)
    tile = choose_tile(_TILES, num_tokens)
    grid = (triton.cdiv(num_tokens, tile.tokens), triton.cdiv(num_outputs, tile.outputs))
    _w8a8_matmul_kernel[grid](
        x,
        x_scales,
        weight,
        weight_scales,
        out,
        num_tokens,
        num_outputs,
        num_inputs,
        SUMS[x.dtype],
        tile.tokens,
        tile.outputs,
        tile.inputs,
        GROUP_TILES,
        num_warps=tile.launch.num_warps,
        num_stages=tile.launch.num_stages,
    )
    return out


VARIANTS = tuple(
    Variant(
        name=f"w8a8_matmul {name} {tile.name}",
        kernel=_w8a8_matmul_kernel,
        arguments={
            "x_ptr": f"*{name}:16",
            "x_scales_ptr": "*fp32:16",
            "weight_ptr": f"*{name}:16",
            "weight_scales_ptr": "*fp32:16",
            "out_ptr": "*bf16:16",
            "num_tokens": "i32",
            "num_outputs": "i32:16",
            "num_inputs": "i32:16",
        },
        constants={
            "SUM": SUMS[dtype],
            "TOKENS": tile.tokens,
            "OUTPUTS": tile.outputs,
            "INPUTS": tile.inputs,
            "GROUP_TILES": GROUP_TILES,
        },
        launch=tile.launch,
        requires=(of_warp_groups if tile.tokens >= 64 else of_warps,),
        min_capability=capability,
    )
    for dtype, name, of_warp_groups, of_warps, capability in (
        (torch.int8, "i8", "IGMMA", "IMMA", 80),
        (torch.float8_e4m3fn, "fp8e4nv", "QGMMA", "HMMA", 89),
    )
    for tile in _TILES
)
