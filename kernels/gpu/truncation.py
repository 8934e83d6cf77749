"""Top-k, top-p and min-p without a sort: the smallest weight that they keep, of each row.

Weights lie in 0 .. 1, and such floats are in the order of their bits. A histogram over the upper
bits gives a bound below which nothing can be kept; what is above it, mostly a few hundred weights,
is gathered. Among these the threshold is found by bisection over the bits, twice: top-k asks how
many weights are above, top-p how much they weigh. A program does one row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.gpu.vocabulary_softmax import (
    BLOCK,
    LAUNCH,
    VocabularySoftmax,
    weight,
)

_CANDIDATES = 2048  # that a program looks at at a time
_SEARCH_LAUNCH = LaunchConfig(num_warps=8)
_BINS: tl.constexpr = tl.constexpr(512)  # of which a weight of 1 is in number 508
_BIN_BITS: tl.constexpr = tl.constexpr(21)  # four bins for a factor of two
_ONE: tl.constexpr = tl.constexpr(0x3F800000)  # the bits of 1.0, the largest weight


@triton.jit
def _from_bits(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(weights: tl.tensor) -> tl.tensor:
    return weights.to(tl.int32, bitcast=True)


@triton.jit
def _keeps_all(
    token: tl.tensor,
    temperature: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    min_p: tl.tensor,
    vocab_size: tl.tensor,
) -> tl.tensor:
    """Whether a row is not drawn from, or from all of it."""
    is_truncated = (k < vocab_size) | (p < 1) | (min_p > 0)
    return (token < 0) | (temperature == 0) | (is_truncated == 0)


@triton.jit
def _gather_candidates_kernel(
    logits_ptr: tl.tensor,  # float32 [num_rows, vocab_size]
    highest_ptr: tl.tensor,  # float32 [num_rows]
    total_ptr: tl.tensor,  # float64 [num_rows]
    tokens_ptr: tl.tensor,  # int64 [num_rows], FAULTY where there is none
    temperature_ptr: tl.tensor,  # float32 [num_rows]
    top_k_ptr: tl.tensor,  # int64 [num_rows]
    top_p_ptr: tl.tensor,  # float64 [num_rows]
    min_p_ptr: tl.tensor,  # float32 [num_rows]
    candidates_ptr: tl.tensor,  # float32 [num_rows, vocab_size]: the weights from `bounds` up
    counts_ptr: tl.tensor,  # int32 [num_rows]
    bounds_ptr: tl.tensor,  # float32 [num_rows]: nothing below is kept
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k, p, bound = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    degrees = tl.load(temperature_ptr + row)
    if _keeps_all(tl.load(tokens_ptr + row), degrees, k, p, bound, vocab_size):
        return
    logits_ptr += row * vocab_size
    best = tl.load(highest_ptr + row)
    if (k < vocab_size) | (p < 1):
        in_bins = tl.zeros((_BINS,), tl.int32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside = token < vocab_size
            block = tl.load(logits_ptr + token, mask=inside, other=float("-inf"))
            in_bins += tl.histogram(
                _bits(weight(block, best, degrees)) >> _BIN_BITS, _BINS, mask=inside
            )
        number = tl.arange(0, _BINS)
        if k < vocab_size:
            from_bin_up = vocab_size - (tl.cumsum(in_bins, axis=0) - in_bins)
            chosen = tl.max(tl.where(from_bin_up >= k, number, 0), axis=0)
        else:
            # More than what lies below a bin can weigh; top-p may leave out 1 - p of all.
            at_most = in_bins.to(tl.float64) * _from_bits((number + 1) << _BIN_BITS).to(tl.float64)
            below_bin = tl.cumsum(at_most, axis=0) - at_most
            is_left_out = below_bin <= (1 - p) * tl.load(total_ptr + row)
            chosen = tl.max(tl.where(is_left_out, number, 0), axis=0)
        bound = _from_bits(chosen << _BIN_BITS)
    count = 0
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab_size
        block = tl.load(logits_ptr + token, mask=inside, other=float("-inf"))
        weights = weight(block, best, degrees)
        is_candidate = inside & (weights >= bound)
        place = count + tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
        tl.store(candidates_ptr + row * vocab_size + place, weights, mask=is_candidate)
        count += tl.sum(is_candidate.to(tl.int32), axis=0)
    tl.store(counts_ptr + row, count)
    tl.store(bounds_ptr + row, bound)


@triton.jit
def _from_bits_up(
    candidates_ptr: tl.tensor, count: tl.tensor, bits: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """How many of the candidates are at least as large as the float with these bits, and their sum.

    In float64 across blocks.
    """
    number = 0
    mass = tl.zeros((), tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        weights = tl.load(candidates_ptr + index, mask=index < count, other=-1.0)
        reaches = _bits(weights) >= bits  # those of -1 are negative
        number += tl.sum(reaches.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(reaches, weights, 0.0), axis=0).to(tl.float64)
    return number, mass


@triton.jit
def _find_thresholds_kernel(
    candidates_ptr: tl.tensor,  # float32 [num_rows, vocab_size]
    counts_ptr: tl.tensor,  # int32 [num_rows]
    bounds_ptr: tl.tensor,  # float32 [num_rows]
    tokens_ptr: tl.tensor,  # int64 [num_rows], FAULTY where there is none
    temperature_ptr: tl.tensor,  # float32 [num_rows]
    top_k_ptr: tl.tensor,  # int64 [num_rows]
    top_p_ptr: tl.tensor,  # float64 [num_rows]
    min_p_ptr: tl.tensor,  # float32 [num_rows]
    least_ptr: tl.tensor,  # float32 [num_rows]
    total_ptr: tl.tensor,  # float64 [num_rows]: in, of all weights; out, of those that are kept
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k, p, threshold = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    degrees = tl.load(temperature_ptr + row)
    if _keeps_all(tl.load(tokens_ptr + row), degrees, k, p, threshold, vocab_size):
        tl.store(least_ptr + row, 0.0)
        return
    candidates_ptr += row * vocab_size
    count = tl.load(counts_ptr + row)
    low = _bits(tl.load(bounds_ptr + row))
    mass = tl.load(total_ptr + row)
    if k < vocab_size:
        # The smallest weight that has fewer than k above it.
        high = low * 0 + _ONE
        while low < high:
            middle = low + (high - low) // 2
            above, _ = _from_bits_up(candidates_ptr, count, middle + 1, BLOCK)
            low = tl.where(above < k, low, middle + 1)
            high = tl.where(above < k, middle, high)
        above, mass = _from_bits_up(candidates_ptr, count, low + 1, BLOCK)
        mass += (k - above).to(tl.float64) * _from_bits(low).to(tl.float64)
    if p < 1:
        # The smallest weight with less than p of the mass above it.
        high = low * 0 + _ONE
        while low < high:
            middle = low + (high - low) // 2
            _, above_mass = _from_bits_up(candidates_ptr, count, middle + 1, BLOCK)
            low = tl.where(above_mass < p * mass, low, middle + 1)
            high = tl.where(above_mass < p * mass, middle, high)
    threshold = tl.maximum(threshold, _from_bits(low))
    _, kept = _from_bits_up(candidates_ptr, count, _bits(threshold), BLOCK)
    tl.store(least_ptr + row, threshold)
    tl.store(total_ptr + row, kept)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truncation:
    """Which weights of a row are kept."""

    least: Tensor  # float32 [num_rows], the smallest; 0 where all are kept
    total: Tensor  # float64 [num_rows], of what is kept


def truncate(
    logits: Tensor,
    softmax: VocabularySoftmax,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Truncation:
    """The smallest weight exp((logit - highest) / temperature) that is kept, and the sum of such.

    logits: float32 [num_rows, vocab_size], contiguous; the rest as in `ops.SamplingRows`. Rows of
    temperature 0 keep all. Takes memory for another copy of the logits while it runs. Raises
    KernelArgumentError for tensors that are not so.
    """
    require_array("logits", logits, (None, None), torch.float32)
    num_rows, vocab_size = logits.shape
    for name, column, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float64),
        ("min_p", min_p, torch.float32),
    ):
        require_array(name, column, (num_rows,), dtype, device=logits.device)
    candidates = torch.empty_like(logits)
    counts = torch.empty_like(temperature, dtype=torch.int32)
    bounds = torch.empty_like(temperature)
    result = Truncation(least=torch.empty_like(temperature), total=softmax.total.clone())
    grid = (num_rows,)
    _gather_candidates_kernel[grid](
        logits,
        softmax.highest,
        softmax.total,
        softmax.tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        candidates,
        counts,
        bounds,
        vocab_size,
        BLOCK,
        num_warps=LAUNCH.num_warps,
    )
    _find_thresholds_kernel[grid](
        candidates,
        counts,
        bounds,
        softmax.tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        result.least,
        result.total,
        vocab_size,
        _CANDIDATES,
        num_warps=_SEARCH_LAUNCH.num_warps,
    )
    return result


VARIANTS = (
    Variant(
        name="truncate: gather candidates",
        kernel=_gather_candidates_kernel,
        arguments={
            "logits_ptr": "*fp32:16",
            "highest_ptr": "*fp32:16",
            "total_ptr": "*fp64:16",
            "tokens_ptr": "*i64:16",
            "temperature_ptr": "*fp32:16",
            "top_k_ptr": "*i64:16",
            "top_p_ptr": "*fp64:16",
            "min_p_ptr": "*fp32:16",
            "candidates_ptr": "*fp32:16",
            "counts_ptr": "*i32:16",
            "bounds_ptr": "*fp32:16",
            "vocab_size": "i32:16",
        },
        constants={"BLOCK": BLOCK},
        launch=LAUNCH,
    ),
    Variant(
        name="truncate: find thresholds",
        kernel=_find_thresholds_kernel,
        arguments={
            "candidates_ptr": "*fp32:16",
            "counts_ptr": "*i32:16",
            "bounds_ptr": "*fp32:16",
            "tokens_ptr": "*i64:16",
            "temperature_ptr": "*fp32:16",
            "top_k_ptr": "*i64:16",
            "top_p_ptr": "*fp64:16",
            "min_p_ptr": "*fp32:16",
            "least_ptr": "*fp32:16",
            "total_ptr": "*fp64:16",
            "vocab_size": "i32:16",
        },
        constants={"BLOCK": _CANDIDATES},
        launch=_SEARCH_LAUNCH,
    ),
)
