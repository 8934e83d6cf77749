"""The second half of LoRA: from the rank of each token's adapter up to the outputs, added to them.

out += scale * B y (Hu et al., 2021), y being the sum of what `lora_shrink` found. A program does a
tile of outputs for some tokens of one segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import FLOATS, require_array
from pagewire.kernels.gpu.lora_segments import LoraSegments
from pagewire.kernels.gpu.lora_shrink import NUM_PARTS, rank_block, tokens_block
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
_OUTPUTS = 128


@triton.jit(do_not_specialize=["num_tokens"])
def _lora_expand_kernel(
    y_ptr: tl.tensor,  # float32 [NUM_PARTS, num_tokens, RANK_BLOCK]
    b_ptr: tl.tensor,  # [num_adapters, RANK, num_outputs]
    scales_ptr: tl.tensor,  # float32 [num_adapters]
    starts_ptr: tl.tensor,  # int32 [num_segments + 1]
    adapters_ptr: tl.tensor,  # int32 [num_segments]
    out_ptr: tl.tensor,  # [num_tokens, num_outputs]
    num_tokens: tl.tensor,
    num_outputs: tl.tensor,
    NUM_PARTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    segment = tl.program_id(1)
    adapter = tl.load(adapters_ptr + segment).to(tl.int64)
    token = tl.load(starts_ptr + segment) + tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    has_token = token < tl.load(starts_ptr + segment + 1)
    if (adapter < 0) | (tl.max(has_token.to(tl.int32), 0) == 0):
        return
    rank = tl.arange(0, RANK_BLOCK)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    has_output = output < num_outputs
    y = tl.zeros((TOKENS, RANK_BLOCK), tl.float32)
    for part in range(NUM_PARTS):
        row = (part * num_tokens + token).to(tl.int64)
        y += tl.load(
            y_ptr + row[:, None] * RANK_BLOCK + rank[None, :], mask=has_token[:, None], other=0.0
        )
    b = tl.load(
        b_ptr + (adapter * RANK + rank)[:, None] * num_outputs + output[None, :],
        mask=(rank < RANK)[:, None] & has_output[None, :],
        other=0.0,
    )
    change = tl.dot(y.to(b.dtype), b, input_precision="ieee") * tl.load(scales_ptr + adapter)
    out_at = out_ptr + token.to(tl.int64)[:, None] * num_outputs + output[None, :]
    mask = has_token[:, None] & has_output[None, :]
    out = tl.load(out_at, mask=mask).to(tl.float32) + change
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def lora_expand(y: Tensor, b: Tensor, scales: Tensor, segments: LoraSegments, out: Tensor) -> None:
    """Add scale * B y of each token's adapter to `out`, in place.

    y: what `lora_shrink` returned for the same segments; b: floating [num_adapters, rank,
    num_outputs]; scales: float32 [num_adapters], alpha / rank; out: of b's dtype
    [num_tokens, num_outputs]; all contiguous. Tokens without an adapter keep what they have. Raises
    KernelArgumentError.
    """
    require_array("b", b, (None, None, None), *FLOATS)
    num_adapters, rank, num_outputs = b.shape
    require_array("out", out, (None, num_outputs), b.dtype, device=b.device)
    num_tokens, width = len(out), rank_block(rank)
    require_array("y", y, (NUM_PARTS, num_tokens, width), torch.float32, device=b.device)
    require_array("scales", scales, (num_adapters,), torch.float32, device=b.device)
    require_array("adapters", segments.adapters, (None,), device=b.device)
    tokens = tokens_block(segments)
    grid = (
        triton.cdiv(num_outputs, _OUTPUTS),
        len(segments.adapters),
        triton.cdiv(segments.max_tokens, tokens),
    )
    _lora_expand_kernel[grid](
        y,
        b,
        scales,
        segments.starts,
        segments.adapters,
        out,
        num_tokens,
        num_outputs,
        NUM_PARTS,
        rank,
        width,
        tokens,
        _OUTPUTS,
        num_warps=LAUNCH.num_warps,
    )


VARIANTS = tuple(
    Variant(
        name=f"lora_expand bf16 rank {rank}, {tokens} tokens",
        kernel=_lora_expand_kernel,
        arguments={
            "y_ptr": "*fp32:16",
            "b_ptr": "*bf16:16",
            "scales_ptr": "*fp32:16",
            "starts_ptr": "*i32:16",
            "adapters_ptr": "*i32:16",
            "out_ptr": "*bf16:16",
            "num_tokens": "i32",
            "num_outputs": "i32:16",
        },
        constants={
            "NUM_PARTS": NUM_PARTS,
            "RANK": rank,
            "RANK_BLOCK": rank_block(rank),
            "TOKENS": tokens,
            "OUTPUTS": _OUTPUTS,
        },
        launch=LAUNCH,
        requires=("HGMMA" if tokens >= 64 else "HMMA",),
    )
    for rank in (8, 64)
    for tokens in (16, 64)
)
