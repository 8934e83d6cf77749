"""The draw of one token a row, by inversion of the cumulative distribution in token order.

One random number of [0, 1) says at which share of the kept weight the token lies, so the same
number gives the same token here and on a CPU (but for rounding). A program does one row and stops
in the block of the token, on average half way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require_array
from pagewire.kernels.gpu.truncation import Truncation
from pagewire.kernels.gpu.variant import Variant
from pagewire.kernels.gpu.vocabulary_softmax import (
    BLOCK,
    LAUNCH,
    VocabularySoftmax,
    weight,
)
from pagewire.kernels.ops import FAULTY


@triton.jit
def _inverse_cdf_kernel(
    logits_ptr: tl.tensor,  # float32 [num_rows, vocab_size]
    highest_ptr: tl.tensor,  # float32 [num_rows]
    temperature_ptr: tl.tensor,  # float32 [num_rows]
    least_ptr: tl.tensor,  # float32 [num_rows]
    total_ptr: tl.tensor,  # float64 [num_rows]
    uniform_ptr: tl.tensor,  # float64 [num_rows]
    tokens_ptr: tl.tensor,  # int64 [num_rows]: in, the most likely; out, drawn at a temperature
    vocab_size: tl.tensor,
    FAULTY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    degrees = tl.load(temperature_ptr + row)
    if (degrees == 0) | (tl.load(tokens_ptr + row) == FAULTY):
        return
    best, smallest = tl.load(highest_ptr + row), tl.load(least_ptr + row)
    rest = tl.load(uniform_ptr + row) * tl.load(total_ptr + row)  # of the weight before the token
    drawn, start = -1, 0
    last = 0  # with a weight: the token where rounding makes `rest` more than all weigh
    while (start < vocab_size) & (drawn < 0):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab_size
        block = tl.load(logits_ptr + row * vocab_size + token, mask=inside, other=float("-inf"))
        weights = weight(block, best, degrees)
        weights = tl.where(weights >= smallest, weights, 0.0)
        last = tl.maximum(last, tl.max(tl.where(weights > 0, token, 0), axis=0))
        mass = tl.sum(weights, axis=0).to(tl.float64)
        if mass > rest:
            # Sums of another order may differ in the last digit; the token is in this block.
            cumulative = tl.cumsum(weights.to(tl.float64), axis=0)
            passed = tl.sum((cumulative <= rest).to(tl.int32), axis=0)
            drawn = tl.minimum(start + passed, last)
        rest -= mass
        start += BLOCK
    tl.store(tokens_ptr + row, tl.where(drawn < 0, last, drawn).to(tl.int64))


def draw(
    logits: Tensor,
    softmax: VocabularySoftmax,
    truncation: Truncation,
    *,
    temperature: Tensor,
    uniform: Tensor,
) -> None:
    """Overwrite `softmax.tokens` with drawn ones in the rows whose temperature is above 0.

    logits: float32 [num_rows, vocab_size], contiguous; temperature: float32, uniform: float64,
    from [0, 1), both [num_rows]. Faulty rows stay so. Raises KernelArgumentError for tensors
    that are not so.
    """
    require_array("logits", logits, (None, None), torch.float32)
    num_rows, vocab_size = logits.shape
    require_array("temperature", temperature, (num_rows,), torch.float32, device=logits.device)
    require_array("uniform", uniform, (num_rows,), torch.float64, device=logits.device)
    _inverse_cdf_kernel[(num_rows,)](
        logits,
        softmax.highest,
        temperature,
        truncation.least,
        truncation.total,
        uniform,
        softmax.tokens,
        vocab_size,
        FAULTY,
        BLOCK,
        num_warps=LAUNCH.num_warps,
    )


VARIANTS = (
    Variant(
        name="inverse_cdf",
        kernel=_inverse_cdf_kernel,
        arguments={
            "logits_ptr": "*fp32:16",
            "highest_ptr": "*fp32:16",
            "temperature_ptr": "*fp32:16",
            "least_ptr": "*fp32:16",
            "total_ptr": "*fp64:16",
            "uniform_ptr": "*fp64:16",
            "tokens_ptr": "*i64:16",
            "vocab_size": "i32:16",
        },
        constants={"FAULTY": FAULTY, "BLOCK": BLOCK},
        launch=LAUNCH,
    ),
)
