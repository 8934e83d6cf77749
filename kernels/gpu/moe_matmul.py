"""The products of tokens with the matrices of their experts, in one launch (grouped GEMM).

Out of `moe_align` comes which pairs of token and expert a tile holds; each row of a tile is read
from where its pair is and written to where it belongs, so nothing is sorted back. A row depends on
no other. A program does one tile of the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import FLOATS, require, require_array
from pagewire.kernels.gpu.matmul_tile import Tile
from pagewire.kernels.gpu.moe_align import ExpertTiles
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

_SMALL = Tile(tokens=16, outputs=64, inputs=128, launch=LaunchConfig(num_warps=4, num_stages=4))
_LARGE = Tile(tokens=64, outputs=128, inputs=64, launch=LaunchConfig(num_warps=4, num_stages=3))
_TILES = {tile.tokens: tile for tile in (_SMALL, _LARGE)}


def tile_size(num_pairs: int, num_experts: int) -> int:
    """The `tile` of `moe_align` for so many pairs: large once experts fill such tiles on average.

    Follows from the shapes alone.
    """
    return _LARGE.tokens if num_pairs >= _LARGE.tokens * num_experts else _SMALL.tokens


@triton.jit(do_not_specialize=["num_pairs"])
def _moe_matmul_kernel(
    x_ptr: tl.tensor,  # [num_pairs / PAIRS_PER_ROW, num_inputs]
    weight_ptr: tl.tensor,  # [num_experts, num_outputs, num_inputs]
    pairs_ptr: tl.tensor,  # int32 [max_tiles, TILE]
    tile_experts_ptr: tl.tensor,  # int32 [max_tiles]
    factors_ptr: tl.tensor,  # float32 [num_pairs], read with WEIGHTED only
    out_ptr: tl.tensor,  # [num_pairs, num_outputs]
    num_pairs: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    PAIRS_PER_ROW: tl.constexpr,
    WEIGHTED: tl.constexpr,
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
    x_at = x_ptr + (pair // PAIRS_PER_ROW).to(tl.int64)[:, None] * num_inputs
    weight_at = weight_ptr + (expert * num_outputs + output)[None, :] * num_inputs
    total = tl.zeros((TILE, OUTPUTS), tl.float32)
    for start in range(0, num_inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        inside = column < num_inputs
        x = tl.load(x_at + column[None, :], mask=has_pair[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            weight_at + column[:, None], mask=inside[:, None] & has_output[None, :], other=0.0
        )
        total = tl.dot(x, weight, total, input_precision="ieee")
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
    out = torch.empty((num_pairs, num_outputs), dtype=x.dtype, device=x.device)
    _moe_matmul_kernel[(max_tiles, triton.cdiv(num_outputs, tile.outputs))](
        x,
        weight,
        tiles.pairs,
        tiles.experts,
        tiles.pairs if factors is None else factors,
        out,
        num_pairs,
        num_outputs,
        num_inputs,
        num_pairs // num_rows,
        factors is not None,
        size,
        tile.outputs,
        tile.inputs,
        num_warps=tile.launch.num_warps,
        num_stages=tile.launch.num_stages,
    )
    return out


VARIANTS = tuple(
    Variant(
        name=f"moe_matmul bf16 {tile.name}{' weighted' if weighted else ''}",
        kernel=_moe_matmul_kernel,
        arguments={
            "x_ptr": "*bf16:16",
            "weight_ptr": "*bf16:16",
            "pairs_ptr": "*i32:16",
            "tile_experts_ptr": "*i32:16",
            "factors_ptr": "*fp32:16" if weighted else "*i32:16",
            "out_ptr": "*bf16:16",
            "num_pairs": "i32",
            "num_outputs": "i32:16",
            "num_inputs": "i32:16",
        },
        constants={
            "PAIRS_PER_ROW": 1 if weighted else 8,
            "WEIGHTED": weighted,
            "TILE": tile.tokens,
            "OUTPUTS": tile.outputs,
            "INPUTS": tile.inputs,
        },
        launch=tile.launch,
        requires=("HGMMA" if tile.tokens >= 64 else "HMMA",),
    )
    for tile in _TILES.values()
    for weighted in (False, True)
)
