"""A mixture of experts in 8 bits on a GPU: all experts of a layer in one product after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.experts import Routing
from pagewire.kernels.gpu.moe_align import moe_align
from pagewire.kernels.gpu.moe_matmul import moe_matmul_8_bits, tile_size
from pagewire.kernels.gpu.silu_mul_quant import silu_mul_quant
from pagewire.kernels.gpu.w8a8_linear import W8A8Linear, as_tokens
from pagewire.kernels.ops import Activation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class W8A8Experts:
    """Implements `pagewire.kernels.experts.Experts`.

    Calls raise KernelArgumentError for activations of another size or dtype than the matrices'.
    """

    gate_up: Tensor  # int8 or float8_e4m3fn [num_experts, 2 * size, hidden_size], gate first
    gate_up_scales: Tensor  # float32 [num_experts, 2 * size]
    down: Tensor  # of the same dtype [num_experts, hidden_size, size]
    down_scales: Tensor  # float32 [num_experts, hidden_size]
    dtype: torch.dtype  # of results

    @property
    def takes_quantized(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        parts = (self.gate_up, self.gate_up_scales, self.down, self.down_scales)
        return sum(part.nbytes for part in parts)

    def __call__(self, x: Activation, routing: Routing) -> Tensor:
        x = as_tokens(x)
        num_tokens, top_k = routing.experts.shape
        num_experts = len(self.gate_up)
        tile = tile_size(num_tokens * top_k, num_experts)
        tiles = moe_align(routing.experts.int(), num_experts, tile)
        gate_up = moe_matmul_8_bits(
            x.values, x.scales, self.gate_up, self.gate_up_scales, tiles, self.dtype
        )
        values, scales = silu_mul_quant(gate_up, self.down.dtype)  # [num_pairs, size]
        out = moe_matmul_8_bits(
            values,
            scales,
            self.down,
            self.down_scales,
            tiles,
            self.dtype,
            factors=routing.weights.flatten(),
        )
        return out.view(num_tokens, top_k, -1).sum(dim=1)


def w8a8_experts(gate_up: Sequence[W8A8Linear], down: Sequence[W8A8Linear]) -> W8A8Experts:
    """The matrices of each expert, copied behind one another."""
    return W8A8Experts(
        gate_up=torch.stack([each.weight for each in gate_up]),
        gate_up_scales=torch.stack([each.scales for each in gate_up]),
        down=torch.stack([each.weight for each in down]),
        down_scales=torch.stack([each.scales for each in down]),
        dtype=down[0].dtype,
    )
