"""Sorts the tokens of a mixture of experts by expert, in tiles that hold tokens of one expert only.

A pair is a token and one of its experts, numbered token * top_k + choice. Each expert's pairs keep
their order and start at a tile of their own, so the result never depends on how programs are
scheduled. Its size follows from the shapes alone, so a CUDA graph can hold it. A program does one
expert.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require, require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
UNUSED = -1  # the expert of a tile without pairs
_BLOCK = 2048  # pairs that a program looks at at a time


@triton.jit(do_not_specialize=["num_pairs"])
def _count_pairs_kernel(
    experts_ptr: tl.tensor,  # int32 [num_pairs]
    counts_ptr: tl.tensor,  # int32 [num_experts]
    num_pairs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=-1)
        count += tl.sum((experts == expert).to(tl.int32), 0)
    tl.store(counts_ptr + expert, count)


@triton.jit(do_not_specialize=["num_pairs"])
def _place_pairs_kernel(
    experts_ptr: tl.tensor,  # int32 [num_pairs]
    counts_ptr: tl.tensor,  # int32 [num_experts]
    pairs_ptr: tl.tensor,  # int32 [max_tiles * TILE]
    tile_experts_ptr: tl.tensor,  # int32 [max_tiles]
    num_pairs: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS_BLOCK)
    counts = tl.load(counts_ptr + other, mask=other < NUM_EXPERTS, other=0)
    tiles = (counts + TILE - 1) // TILE
    first_tile = tl.sum(tl.where(other < expert, tiles, 0), 0)
    num_tiles = tl.sum(tl.where(other == expert, tiles, 0), 0)
    for start in range(0, num_tiles, EXPERTS_BLOCK):
        tile = start + other
        tl.store(tile_experts_ptr + first_tile + tile, expert, mask=tile < num_tiles)
    place = first_tile * TILE
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=-1)
        is_own = (experts == expert).to(tl.int32)
        rank = tl.cumsum(is_own, 0) - 1
        tl.store(pairs_ptr + place + rank, pair, mask=is_own > 0)
        place += tl.sum(is_own, 0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertTiles:
    """Pairs in tiles of one expert each."""

    pairs: Tensor  # int32 [max_tiles, tile], num_pairs where there is none
    experts: Tensor  # int32 [max_tiles], UNUSED for tiles behind the last
    num_pairs: int


def moe_align(experts: Tensor, num_experts: int, tile: int) -> ExpertTiles:
    """Sort pairs by expert into tiles of `tile` pairs.

    experts: int32 [num_tokens, top_k], contiguous; others than 0 up to `num_experts` get no tile.
    `tile` is a power of two. Raises KernelArgumentError.
    """
    require_array("experts", experts, (None, None), torch.int32)
    require(tile.bit_count() == 1, f"tile is {tile}; give a power of two")
    num_pairs = experts.numel()
    max_tiles = num_pairs // tile + min(num_pairs, num_experts)  # each expert's last may be partial
    counts = torch.empty(num_experts, dtype=torch.int32, device=experts.device)
    result = ExpertTiles(
        pairs=experts.new_full((max_tiles, tile), num_pairs),
        experts=experts.new_full((max_tiles,), UNUSED),
        num_pairs=num_pairs,
    )
    warps = LAUNCH.num_warps
    _count_pairs_kernel[(num_experts,)](experts, counts, num_pairs, _BLOCK, num_warps=warps)
    _place_pairs_kernel[(num_experts,)](
        experts,
        counts,
        result.pairs,
        result.experts,
        num_pairs,
        num_experts,
        triton.next_power_of_2(num_experts),
        tile,
        _BLOCK,
        num_warps=warps,
    )
    return result


VARIANTS = (
    Variant(
        name="moe_align: count pairs",
        kernel=_count_pairs_kernel,
        arguments={"experts_ptr": "*i32:16", "counts_ptr": "*i32:16", "num_pairs": "i32"},
        constants={"BLOCK": _BLOCK},
        launch=LAUNCH,
    ),
    Variant(
        name="moe_align: place pairs, 128 experts",
        kernel=_place_pairs_kernel,
        arguments={
            "experts_ptr": "*i32:16",
            "counts_ptr": "*i32:16",
            "pairs_ptr": "*i32:16",
            "tile_experts_ptr": "*i32:16",
            "num_pairs": "i32",
        },
        constants={"NUM_EXPERTS": 128, "EXPERTS_BLOCK": 128, "TILE": 64, "BLOCK": _BLOCK},
        launch=LAUNCH,
    ),
)
