"""Which experts compute a token of a mixture of experts, and what each of them weighs.

The softmax of the router's logits and the largest of it (Shazeer et al., 2017; Jiang et al.,
Mixtral, 2024). A program does one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import FLOATS, require, require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=1)


@triton.jit
def _moe_route_kernel(
    logits_ptr: tl.tensor,  # [num_tokens, NUM_EXPERTS]
    experts_ptr: tl.tensor,  # int32 [num_tokens, TOP_K]
    weights_ptr: tl.tensor,  # float32 [num_tokens, TOP_K]
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES_BLOCK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_BLOCK)
    exists = expert < NUM_EXPERTS
    logits = tl.load(
        logits_ptr + token * NUM_EXPERTS + expert, mask=exists, other=float("-inf")
    ).to(tl.float32)
    shares = tl.exp(logits - tl.max(logits, 0))
    shares = shares / tl.sum(shares, 0)
    choice = tl.arange(0, CHOICES_BLOCK)
    experts = tl.zeros((CHOICES_BLOCK,), tl.int32)
    weights = tl.zeros((CHOICES_BLOCK,), tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(logits, 0)
        best = tl.minimum(best, NUM_EXPERTS - 1)  # also if the logits are NaN
        weight = tl.sum(tl.where(expert == best, shares, 0.0), 0)
        experts = tl.where(choice == i, best, experts)
        weights = tl.where(choice == i, weight, weights)
        logits = tl.where(expert == best, float("-inf"), logits)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 0)
    at = token * TOP_K + choice
    tl.store(experts_ptr + at, experts, mask=choice < TOP_K)
    tl.store(weights_ptr + at, weights, mask=choice < TOP_K)


def moe_route(logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token, the most likely first, and their weights.

    logits: floating [num_tokens, num_experts], contiguous. Of equally likely experts the first
    comes first. With `renormalize` the weights of a token add up to 1. Returns int32 and float32,
    [num_tokens, top_k]. Raises KernelArgumentError.
    """
    require_array("logits", logits, (None, None), *FLOATS)
    num_tokens, num_experts = logits.shape
    require(1 <= top_k <= num_experts, f"top_k is {top_k}; give 1 to {num_experts}, all experts")
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    _moe_route_kernel[(num_tokens,)](
        logits,
        experts,
        weights,
        num_experts,
        triton.next_power_of_2(num_experts),
        top_k,
        triton.next_power_of_2(top_k),
        renormalize,
        num_warps=LAUNCH.num_warps,
    )
    return experts, weights


VARIANTS = (
    Variant(
        name="moe_route bf16 8 of 128",
        kernel=_moe_route_kernel,
        arguments={
            "logits_ptr": "*bf16:16",
            "experts_ptr": "*i32:16",
            "weights_ptr": "*fp32:16",
        },
        constants={
            "NUM_EXPERTS": 128,
            "EXPERTS_BLOCK": 128,
            "TOP_K": 8,
            "CHOICES_BLOCK": 8,
            "RENORMALIZE": True,
        },
        launch=LAUNCH,
    ),
)
