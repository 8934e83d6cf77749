"""The products of tokens with the matrices of their experts, in one launch (grouped GEMM).

Out of `moe_align` comes which pairs of token and expert a tile holds; each row of a tile is read
from where its pair is and written to where it belongs, so nothing is sorted back. A row depends on
no other. In 8 bits, with a scale for each row of x and each output, sums are as in `w8a8_matmul`.
A program does one tile of the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.activation_quant import LARGEST
from pagewire.kernels.gpu.arguments import FLOATS, require, require_array
from pagewire.kernels.gpu.matmul_tile import Tile
from pagewire.kernels.gpu.moe_align import ExpertTiles
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.gpu.w8a8_matmul import SUMS

_SMALL = Tile(tokens=16, outputs=64, inputs=128, launch=LaunchConfig(num_warps=4, num_stages=4))
_LARGE = Tile(tokens=64, outputs=128, inputs=64, launch=LaunchConfig(num_warps=4, num_stages=3))
_TILES = {tile.tokens: tile for tile in (_SMALL, _LARGE)}
INVARIANT_TILE = _LARGE.tokens  # where a pair must have the same bits among any number of others


def tile_size(num_pairs: int, num_experts: int) -> int:
    """The `tile` of `moe_align` for so many pairs: large once experts fill such tiles on average.

    Follows from the shapes alone.
    """
    return _LARGE.tokens if num_pairs >= _LARGE.tokens * num_experts else _SMALL.tokens


@triton.jit(do_not_specialize=["num_pairs"])
def _moe_matmul_kernel(
    x_ptr: tl.tensor,  # [num_pairs / PAIRS_PER_ROW, num_inputs]
    x_scales_ptr: tl.tensor,  # float32 [num_pairs / PAIRS_PER_ROW], of x in 8 bits; else None
    weight_ptr: tl.tensor,  # [num_experts, num_outputs, num_inputs]
    weight_scales_ptr: tl.tensor,  # float32 [num_experts, num_outputs], of 8 bits; else None
    pairs_ptr: tl.tensor,  # int32 [max_tiles, TILE]
    tile_experts_ptr: tl.tensor,  # int32 [max_tiles]
    factors_ptr: tl.tensor,  # float32 [num_pairs], read with WEIGHTED only
    out_ptr: tl.tensor,  # [num_pairs, num_outputs]
    num_pairs: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    PAIRS_PER_ROW: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUM: tl.constexpr,  # dtype of the sum of products
    TILE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs_ptr + tile * TILE + tl.arange(0, TILE))
    has_pair = pair < num_pairs
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    has_output = output < num_outputs
    row = pair // PAIRS_PER_ROW
    x_at = x_ptr + row.to(tl.int64)[:, None] * num_inputs
    of_expert = expert * num_outputs + output
    weight_at = weight_ptr + of_expert[None, :] * num_inputs
    total = tl.zeros((TILE, OUTPUTS), SUM)
    for start in range(0, num_inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        inside = column < num_inputs
        x = tl.load(x_at + column[None, :], mask=has_pair[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            weight_at + column[:, None], mask=inside[:, None] & has_output[None, :], other=0.0
        )
        total = tl.dot(
            x,
            weight,
            total,
            input_precision="ieee",
            out_dtype=SUM,
            max_num_imprecise_acc=INPUTS,  # of float8; see w8a8_matmul
        )
    total = total.to(tl.float32)
    if x_scales_ptr is not None:
        x_scales = tl.load(x_scales_ptr + row, mask=has_pair, other=0.0)
        weight_scales = tl.load(weight_scales_ptr + of_expert, mask=has_output, other=0.0)
        total *= x_scales[:, None] * weight_scales[None, :]
    if WEIGHTED:
        total *= tl.load(factors_ptr + pair, mask=has_pair, other=0.0)[:, None]
    tl.store(
        out_ptr + pair.to(tl.int64)[:, None] * num_outputs + output[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=has_pair[:, None] & has_output[None, :],
    )


def moe_matmul(
    x: Tensor, weight: Tensor, tiles: ExpertTiles, factors: Tensor | None = None
) -> Tensor:
    """x @ weightᵀ of each pair's expert, times its factor if there are any.

    x: floating [num_tokens, num_inputs] or [num_pairs, num_inputs], a row for each pair or for all
    pairs of a token; weight: of the same dtype [num_experts, num_outputs, num_inputs]; factors:
    float32 [num_pairs]; all contiguous. Returns [num_pairs, num_outputs]; rows of pairs without a
    tile are left as they are in fresh memory. Raises KernelArgumentError.
    """
    require_array("x", x, (None, None), *FLOATS)
    return _run(x, None, weight, None, tiles, factors, x.dtype)


def moe_matmul_8_bits(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    tiles: ExpertTiles,
    dtype: torch.dtype,
    factors: Tensor | None = None,
) -> Tensor:
    """As `moe_matmul`, of (x * x_scales) @ (weight * weight_scales)ᵀ, in `dtype`.

    x and weight: int8 or float8_e4m3fn; x_scales: float32, one for each row of x; weight_scales:
    float32 [num_experts, num_outputs]; all contiguous. Raises KernelArgumentError.
    """
    require_array("x", x, (None, None), *LARGEST)
    require_array("x_scales", x_scales, (len(x),), torch.float32, device=x.device)
    outputs = tuple(weight.shape[:2])
    require_array("weight_scales", weight_scales, outputs, torch.float32, device=x.device)
    require(dtype in FLOATS, f"dtype is {dtype}; give one of {', '.join(map(str, FLOATS))}")
    return _run(x, x_scales, weight, weight_scales, tiles, factors, dtype)


def _run(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Tensor,
    weight_scales: Tensor | None,
    tiles: ExpertTiles,
    factors: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    num_rows, num_inputs = x.shape
    num_pairs = tiles.num_pairs
    require(
        num_rows > 0 and num_pairs % num_rows == 0,
        f"x has {num_rows} rows for {num_pairs} pairs; give one for each pair or token",
    )
    require_array("weight", weight, (None, None, num_inputs), x.dtype, device=x.device)
    num_outputs = weight.shape[1]
    max_tiles, size = tiles.pairs.shape
    require(size in _TILES, f"tiles hold {size} pairs; align with `tile_size`")
    require_array("pairs", tiles.pairs, (None, None), torch.int32, device=x.device)
    if factors is not None:
        require_array("factors", factors, (num_pairs,), torch.float32, device=x.device)
    tile = _TILES[size]
    out = torch.empty((num_pairs, num_outputs), dtype=dtype, device=x.device)
    _moe_matmul_kernel[(max_tiles, triton.cdiv(num_outputs, tile.outputs))](
        x,
        x_scales,
        weight,
        weight_scales,
        tiles.pairs,
        tiles.experts,
        tiles.pairs if factors is None else factors,
        out,
        num_pairs,
        num_outputs,
        num_inputs,
        num_pairs // num_rows,
        factors is not None,
        SUMS.get(x.dtype, tl.float32),
        size,
        tile.outputs,
        tile.inputs,
        num_warps=tile.launch.num_warps,
        num_stages=tile.launch.num_stages,
    )
    return out


VARIANTS = tuple(
    Variant(
        name=f"moe_matmul {name} {tile.name}{' weighted' if weighted else ''}",
        kernel=_moe_matmul_kernel,
        arguments={
            "x_ptr": f"*{name}:16",
            **({"x_scales_ptr": "*fp32:16"} if dtype in LARGEST else {}),
            "weight_ptr": f"*{name}:16",
            **({"weight_scales_ptr": "*fp32:16"} if dtype in LARGEST else {}),
            "pairs_ptr": "*i32:16",
            "tile_experts_ptr": "*i32:16",
            "factors_ptr": "*fp32:16" if weighted else "*i32:16",
            "out_ptr": "*bf16:16",
            "num_pairs": "i32",
            "num_outputs": "i32:16",
            "num_inputs": "i32:16",
        },
        constants={
            **({} if dtype in LARGEST else {"x_scales_ptr": None, "weight_scales_ptr": None}),
            "PAIRS_PER_ROW": 1 if weighted else 8,
            "WEIGHTED": weighted,
            "SUM": SUMS.get(dtype, tl.float32),
            "TILE": tile.tokens,
            "OUTPUTS": tile.outputs,
            "INPUTS": tile.inputs,
        },
        launch=tile.launch,
        requires=(of_warp_groups if tile.tokens >= 64 else of_warps,),
        min_capability=capability,
    )
    for dtype, name, of_warp_groups, of_warps, capability in (
        (torch.bfloat16, "bf16", "HGMMA", "HMMA", 80),
        (torch.int8, "i8", "IGMMA", "IMMA", 80),
        (torch.float8_e4m3fn, "fp8e4nv", "QGMMA", "HMMA", 89),
    )
    for tile in _TILES.values()
    for weighted in (False, True)
)
