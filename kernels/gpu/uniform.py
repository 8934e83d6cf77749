"""Random numbers keyed by a seed and a position, made where they are used.

To the bit those of `pagewire.engine.random_numbers`, so a stream that moves to another kind of
worker draws on with the same numbers: SplitMix64, twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require_array
from pagewire.kernels.gpu.split_mix import mix
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
_BLOCK = 128


@triton.jit(do_not_specialize=["num_rows"])
def _uniform_kernel(
    seeds_ptr: tl.tensor,  # int64 [num_rows], the bits of an unsigned seed
    positions_ptr: tl.tensor,  # int64 [num_rows]
    numbers_ptr: tl.tensor,  # float64 [num_rows]
    num_rows: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    seed = tl.load(seeds_ptr + row, mask=inside, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions_ptr + row, mask=inside, other=0).to(tl.uint64, bitcast=True)
    bits = mix(mix(seed) + position) >> 11  # as many as a float64 holds exactly
    tl.store(numbers_ptr + row, bits.to(tl.float64) * (1.0 / (1 << 53)), mask=inside)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number of [0, 1) for each (seed, position), float64 [num_rows].

    seeds: int64 [num_rows], unsigned seeds by their bits; positions: int64 [num_rows]. Raises
    KernelArgumentError for tensors that are not so.
    """
    require_array("seeds", seeds, (None,), torch.int64)
    require_array("positions", positions, tuple(seeds.shape), torch.int64, device=seeds.device)
    numbers = torch.empty_like(seeds, dtype=torch.float64)
    grid = (triton.cdiv(len(seeds), _BLOCK),)
    _uniform_kernel[grid](seeds, positions, numbers, len(seeds), _BLOCK, num_warps=LAUNCH.num_warps)
    return numbers


VARIANTS = (
    Variant(
        name="uniform",
        kernel=_uniform_kernel,
        arguments={
            "seeds_ptr": "*i64:16",
            "positions_ptr": "*i64:16",
            "numbers_ptr": "*fp64:16",
            "num_rows": "i32",
        },
        constants={"BLOCK": _BLOCK},
        launch=LAUNCH,
    ),
)
