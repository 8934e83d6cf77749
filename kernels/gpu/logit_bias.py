"""Logit bias: numbers added to single logits, of all rows of a step at once.

A bias of -inf forbids a token: minimum lengths forbid stop tokens so. A program does one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
_BLOCK = 512  # pairs that a program changes at a time


@triton.jit
def _add_logit_bias_kernel(
    logits_ptr: tl.tensor,  # float32 [num_rows, vocab_size]
    offsets_ptr: tl.tensor,  # int32 [num_rows + 1]
    tokens_ptr: tl.tensor,  # int64 [num_pairs]
    bias_ptr: tl.tensor,  # float32 [num_pairs]
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1)
    for start in range(tl.load(offsets_ptr + row), end, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < end
        places = logits_ptr + row * vocab_size + tl.load(tokens_ptr + pair, mask=inside, other=0)
        values = tl.load(places, mask=inside) + tl.load(bias_ptr + pair, mask=inside)
        tl.store(places, values, mask=inside)


def add_logit_bias(logits: Tensor, *, offsets: Tensor, tokens: Tensor, bias: Tensor) -> None:
    """Add to some logits of each row, in place.

    logits: float32 [num_rows, vocab_size], contiguous. The pairs of a row lie at offsets[row] up to
    offsets[row + 1]; offsets: int32 [num_rows + 1]; tokens: int64 [num_pairs], distinct in a row;
    bias: float32 [num_pairs]. Raises KernelArgumentError for tensors that are not so.
    """
    require_array("logits", logits, (None, None), torch.float32)
    num_rows, vocab_size = logits.shape
    require_array("offsets", offsets, (num_rows + 1,), torch.int32, device=logits.device)
    require_array("tokens", tokens, (None,), torch.int64, device=logits.device)
    require_array("bias", bias, (len(tokens),), torch.float32, device=logits.device)
    _add_logit_bias_kernel[(num_rows,)](
        logits, offsets, tokens, bias, vocab_size, _BLOCK, num_warps=LAUNCH.num_warps
    )


VARIANTS = (
    Variant(
        name="add_logit_bias",
        kernel=_add_logit_bias_kernel,
        arguments={
            "logits_ptr": "*fp32:16",
            "offsets_ptr": "*i32:16",
            "tokens_ptr": "*i64:16",
            "bias_ptr": "*fp32:16",
            "vocab_size": "i32:16",
        },
        constants={"BLOCK": _BLOCK},
        launch=LAUNCH,
    ),
)
