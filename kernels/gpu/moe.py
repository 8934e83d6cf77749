"""A mixture of SwiGLU experts out of the Triton kernels for it."""

from torch import Tensor

from pagewire.kernels.gpu.moe_align import moe_align
from pagewire.kernels.gpu.moe_matmul import moe_matmul, tile_size
from pagewire.kernels.gpu.moe_route import moe_route
from pagewire.kernels.gpu.silu_mul import silu_mul


def moe_mlp(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    *,
    renormalize: bool,
) -> Tensor:
    """Σ weight · down(silu(gate x) * up x) over the experts that each token is routed to.

    x: floating [num_tokens, dim]; router_logits: floating [num_tokens, num_experts]; gate_up:
    [num_experts, 2 * hidden, dim], gate first; down: [num_experts, dim, hidden]; all contiguous,
    the matrices of the dtype of x. See `moe_route` for `renormalize`. Returns [num_tokens, dim].
    Raises KernelArgumentError.
    """
    num_tokens, dim = x.shape
    num_experts = len(gate_up)
    experts, weights = moe_route(router_logits, top_k, renormalize=renormalize)
    tiles = moe_align(experts, num_experts, tile_size(experts.numel(), num_experts))
    hidden = silu_mul(moe_matmul(x, gate_up, tiles))  # [num_tokens * top_k, hidden]
    out = moe_matmul(hidden, down, tiles, factors=weights.flatten())
    return out.view(num_tokens, top_k, dim).sum(dim=1)
