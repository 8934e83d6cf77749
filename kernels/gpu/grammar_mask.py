"""The mask of a grammar: logits of tokens that it forbids become -inf.

Bit v % 32 of word v // 32 is 1 where token v is allowed, as llguidance and xgrammar write it. Of
the logits nothing is read, and only what is forbidden is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
_BLOCK = 4096  # tokens of a program


@triton.jit
def _mask_forbidden_kernel(
    logits_ptr: tl.tensor,  # float32 [num_rows, vocab_size]
    bitmask_ptr: tl.tensor,  # int32 [num_rows, num_words]
    vocab_size: tl.tensor,
    num_words: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    words = tl.load(bitmask_ptr + row * num_words + token // 32, mask=inside, other=-1)
    is_forbidden = inside & (((words >> (token % 32)) & 1) == 0)
    tl.store(logits_ptr + row * vocab_size + token, float("-inf"), mask=is_forbidden)


def mask_forbidden(logits: Tensor, bitmask: Tensor) -> None:
    """Set the logits of forbidden tokens to -inf, in place.

    logits: float32 [num_rows, vocab_size], contiguous; bitmask: int32 [num_rows,
    ceil(vocab_size / 32)], all ones (-1) for a row without a grammar. Raises
    KernelArgumentError for tensors that are not so.
    """
    require_array("logits", logits, (None, None), torch.float32)
    num_rows, vocab_size = logits.shape
    num_words = triton.cdiv(vocab_size, 32)
    require_array("bitmask", bitmask, (num_rows, num_words), torch.int32, device=logits.device)
    grid = (num_rows, triton.cdiv(vocab_size, _BLOCK))
    _mask_forbidden_kernel[grid](
        logits, bitmask, vocab_size, num_words, _BLOCK, num_warps=LAUNCH.num_warps
    )


VARIANTS = (
    Variant(
        name="mask_forbidden",
        kernel=_mask_forbidden_kernel,
        arguments={
            "logits_ptr": "*fp32:16",
            "bitmask_ptr": "*i32:16",
            "vocab_size": "i32:16",
            "num_words": "i32",
        },
        constants={"BLOCK": _BLOCK},
        launch=LAUNCH,
    ),
)
