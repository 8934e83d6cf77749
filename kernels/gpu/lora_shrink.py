"""The first half of LoRA: activations down to the rank of each token's adapter.

y = A x (Hu et al., 2021). The sum over the inputs is cut in a fixed number of parts, so that few
tokens keep a GPU busy; `lora_expand` adds them, always in the same order. A program does one part
for some tokens of one segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import FLOATS, require_array
from pagewire.kernels.gpu.lora_segments import LoraSegments
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4, num_stages=3)
NUM_PARTS = 8
_INPUTS = 128  # of one step of the sum
_MIN_RANK = 16  # of a matrix product; smaller ranks are filled up with 0


def rank_block(rank: int) -> int:
    """The width of `lora_shrink`'s result."""
    width: int = triton.next_power_of_2(rank)
    return max(_MIN_RANK, width)


def tokens_block(segments: LoraSegments) -> int:
    """Tokens of a program: in decode most segments have one."""
    return 16 if segments.max_tokens <= 16 else 64


@triton.jit(do_not_specialize=["num_tokens"])
def _lora_shrink_kernel(
    x_ptr: tl.tensor,  # [num_tokens, num_inputs]
    a_ptr: tl.tensor,  # [num_adapters, RANK, num_inputs]
    starts_ptr: tl.tensor,  # int32 [num_segments + 1]
    adapters_ptr: tl.tensor,  # int32 [num_segments]
    out_ptr: tl.tensor,  # float32 [num_parts, num_tokens, RANK_BLOCK]
    num_tokens: tl.tensor,
    num_inputs: tl.tensor,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    part, segment = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(adapters_ptr + segment).to(tl.int64)
    token = tl.load(starts_ptr + segment) + tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    has_token = token < tl.load(starts_ptr + segment + 1)
    if (adapter < 0) | (tl.max(has_token.to(tl.int32), 0) == 0):
        return
    rank = tl.arange(0, RANK_BLOCK)
    x_at = x_ptr + token.to(tl.int64)[:, None] * num_inputs
    a_at = a_ptr + (adapter * RANK + rank)[None, :] * num_inputs
    total = tl.zeros((TOKENS, RANK_BLOCK), tl.float32)
    for start in range(part * INPUTS, num_inputs, tl.num_programs(0) * INPUTS):
        column = start + tl.arange(0, INPUTS)
        inside = column < num_inputs
        x = tl.load(x_at + column[None, :], mask=has_token[:, None] & inside[None, :], other=0.0)
        a = tl.load(
            a_at + column[:, None], mask=inside[:, None] & (rank < RANK)[None, :], other=0.0
        )
        total = tl.dot(x, a, total, input_precision="ieee")
    row = part.to(tl.int64) * num_tokens + token
    tl.store(out_ptr + row[:, None] * RANK_BLOCK + rank[None, :], total, mask=has_token[:, None])


def lora_shrink(x: Tensor, a: Tensor, segments: LoraSegments) -> Tensor:
    """A x of each token's adapter, float32 [NUM_PARTS, num_tokens, rank_block(rank)].

    The parts add up to it. x: floating [num_tokens, num_inputs]; a: of the same dtype
    [num_adapters, rank, num_inputs]; both contiguous. Tokens without an adapter are left as they
    are in fresh memory. Raises KernelArgumentError.
    """
    require_array("x", x, (None, None), *FLOATS)
    num_tokens, num_inputs = x.shape
    require_array("a", a, (None, None, num_inputs), x.dtype, device=x.device)
    require_array("adapters", segments.adapters, (None,), device=x.device)
    rank = a.shape[1]
    width, tokens = rank_block(rank), tokens_block(segments)
    out = torch.empty((NUM_PARTS, num_tokens, width), dtype=torch.float32, device=x.device)
    grid = (NUM_PARTS, len(segments.adapters), triton.cdiv(segments.max_tokens, tokens))
    _lora_shrink_kernel[grid](
        x,
        a,
        segments.starts,
        segments.adapters,
        out,
        num_tokens,
        num_inputs,
        rank,
        width,
        tokens,
        _INPUTS,
        num_warps=LAUNCH.num_warps,
        num_stages=LAUNCH.num_stages,
    )
    return out


VARIANTS = tuple(
    Variant(
        name=f"lora_shrink bf16 rank {rank}, {tokens} tokens",
        kernel=_lora_shrink_kernel,
        arguments={
            "x_ptr": "*bf16:16",
            "a_ptr": "*bf16:16",
            "starts_ptr": "*i32:16",
            "adapters_ptr": "*i32:16",
            "out_ptr": "*fp32:16",
            "num_tokens": "i32",
            "num_inputs": "i32:16",
        },
        constants={
            "RANK": rank,
            "RANK_BLOCK": rank_block(rank),
            "TOKENS": tokens,
            "INPUTS": _INPUTS,
        },
        launch=LAUNCH,
        requires=("HGMMA" if tokens >= 64 else "HMMA",),
    )
    for rank in (8, 64)
    for tokens in (16, 64)
)
