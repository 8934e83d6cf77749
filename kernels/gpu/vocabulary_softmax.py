"""The most likely token of each row of logits and the sum of its exponentials, in one pass.

Sampling and log probabilities both start from it. The sum follows the maximum as it rises (online
softmax; Milakov and Gimelshein, 2018), so that no logit is read twice. A program does one row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.ops import FAULTY

BLOCK = 4096  # tokens that a program looks at at a time
LAUNCH = LaunchConfig(num_warps=16)

_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # unlike -inf it can be subtracted


@triton.jit
def weight(logits: tl.tensor, highest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """exp((logits - highest) / temperature), float32: 1 for the most likely, the same bits always.

    The difference comes first: a tiny temperature gives 0 and -inf, never inf - inf.
    """
    return tl.exp(tl.div_rn(logits - highest, temperature))


@triton.jit
def _vocabulary_softmax_kernel(
    logits_ptr: tl.tensor,  # float32 [num_rows, vocab_size]
    temperature_ptr: tl.tensor,  # float32 [num_rows]
    tokens_ptr: tl.tensor,  # int64 [num_rows]
    highest_ptr: tl.tensor,  # float32 [num_rows]
    total_ptr: tl.tensor,  # float64 [num_rows]
    vocab_size: tl.tensor,
    FAULTY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    degrees = tl.load(temperature_ptr + row)
    degrees = tl.where(degrees > 0, degrees, 1.0)
    best, first, num_nan = _LOWEST, 0, 0
    sum_of_weights = tl.zeros((), tl.float64)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab_size
        block = tl.load(logits_ptr + row * vocab_size + token, mask=inside, other=float("-inf"))
        num_nan += tl.sum((block != block).to(tl.int32), axis=0)
        block_best, index = tl.max(block, axis=0, return_indices=True)
        first = tl.where(block_best > best, start + index, first)
        new_best = tl.maximum(best, block_best)
        sum_of_weights *= weight(best, new_best, degrees).to(tl.float64)
        sum_of_weights += tl.sum(weight(block, new_best, degrees), axis=0).to(tl.float64)
        best = new_best
    is_faulty = (num_nan > 0) | (best == _LOWEST) | (best == float("inf"))
    tl.store(tokens_ptr + row, tl.where(is_faulty, FAULTY, first).to(tl.int64))
    tl.store(highest_ptr + row, best)
    tl.store(total_ptr + row, sum_of_weights)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabularySoftmax:
    """What one pass over rows of logits finds."""

    tokens: Tensor  # int64 [num_rows], the first of the most likely; FAULTY where there is none
    highest: Tensor  # float32 [num_rows], the largest logit
    total: Tensor  # float64 [num_rows], of exp((logit - highest) / temperature)


def vocabulary_softmax(logits: Tensor, temperature: Tensor) -> VocabularySoftmax:
    """logits: float32 [num_rows, vocab_size], contiguous; temperature: float32 [num_rows].

    A temperature of 0 counts as 1. Raises KernelArgumentError for tensors that are not so.
    """
    require_array("logits", logits, (None, None), torch.float32)
    num_rows, vocab_size = logits.shape
    require_array("temperature", temperature, (num_rows,), torch.float32, device=logits.device)
    result = VocabularySoftmax(
        tokens=temperature.new_empty(num_rows, dtype=torch.int64),
        highest=torch.empty_like(temperature),
        total=temperature.new_empty(num_rows, dtype=torch.float64),
    )
    _vocabulary_softmax_kernel[(num_rows,)](
        logits,
        temperature,
        result.tokens,
        result.highest,
        result.total,
        vocab_size,
        FAULTY,
        BLOCK,
        num_warps=LAUNCH.num_warps,
    )
    return result


VARIANTS = (
    Variant(
        name="vocabulary_softmax",
        kernel=_vocabulary_softmax_kernel,
        arguments={
            "logits_ptr": "*fp32:16",
            "temperature_ptr": "*fp32:16",
            "tokens_ptr": "*i64:16",
            "highest_ptr": "*fp32:16",
            "total_ptr": "*fp64:16",
            "vocab_size": "i32:16",
        },
        constants={"FAULTY": FAULTY, "BLOCK": BLOCK},
        launch=LAUNCH,
    ),
)
