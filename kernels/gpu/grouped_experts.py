"""A mixture of experts on a GPU: all experts of a layer in one product after another.

How many tokens a tile holds follows from how many there are, unless a token must have the same bits
in every batch: see `invariant_matmul`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.experts import Routing, weighted_sum
from pagewire.kernels.gpu.moe_align import moe_align
from pagewire.kernels.gpu.moe_matmul import INVARIANT_TILE, moe_matmul, tile_size
from pagewire.kernels.gpu.silu_mul import silu_mul
from pagewire.kernels.linear import floating
from pagewire.kernels.ops import Activation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupedExperts:
    """Implements `pagewire.kernels.experts.Experts` in floating point.

    Calls raise KernelArgumentError for activations of another dtype or size than the matrices'.
    """

    gate_up: Tensor  # [num_experts, 2 * size, hidden_size], gate first
    down: Tensor  # [num_experts, hidden_size, size]
    invariant: bool = False  # a token has the same bits in every batch

    @property
    def takes_quantized(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: Activation, routing: Routing) -> Tensor:
        num_tokens, top_k = routing.experts.shape
        num_experts = len(self.gate_up)
        tile = INVARIANT_TILE if self.invariant else tile_size(num_tokens * top_k, num_experts)
        tiles = moe_align(routing.experts.int(), num_experts, tile)
        gated = silu_mul(moe_matmul(floating(x), self.gate_up, tiles))  # [num_pairs, size]
        if self.invariant:
            out = moe_matmul(gated, self.down, tiles).view(num_tokens, top_k, -1)
            return weighted_sum(out, routing.weights)
        out = moe_matmul(gated, self.down, tiles, factors=routing.weights.flatten())
        return out.view(num_tokens, top_k, -1).sum(dim=1)


def group_experts(
    gate_up: Sequence[Tensor], down: Sequence[Tensor], *, invariant: bool = False
) -> GroupedExperts:
    """The matrices of each expert, copied behind one another; `invariant` as in GroupedExperts."""
    return GroupedExperts(
        gate_up=torch.stack(tuple(gate_up)), down=torch.stack(tuple(down)), invariant=invariant
    )
