"""Sampling and log probabilities in C++: few passes over the vocabulary, and nothing is sorted."""

import torch
from torch import Tensor

from pagewire.kernels.native_library import NativeFunctions
from pagewire.kernels.ops import Logprobs, SamplingRows


class NativeSamplingPlan:
    """Implements `pagewire.kernels.ops.SamplingPlan`.

    Raises ValueError for tensors that are not as SamplingRows says.
    """

    def __init__(self, functions: NativeFunctions, rows: SamplingRows) -> None:
        self._functions = functions
        self._num_rows = len(rows.temperature)
        self._vocab_size = rows.vocab_size
        self._rows = tuple(
            _checked(values, (self._num_rows,), dtype)
            for values, dtype in (
                (rows.temperature, torch.float32),
                (rows.top_k, torch.int64),
                (rows.top_p, torch.float64),
                (rows.min_p, torch.float32),
            )
        )

    def run(self, logits: Tensor, uniform: Tensor) -> Tensor:
        rows, size = self._num_rows, self._vocab_size
        _checked(logits, (rows, size), torch.float32)
        _checked(uniform, (rows,), torch.float64)
        tokens = torch.empty(rows, dtype=torch.int64)
        self._functions.sample(
            logits.data_ptr(),
            *(values.data_ptr() for values in self._rows),
            uniform.data_ptr(),
            tokens.data_ptr(),
            rows,
            size,
        )
        return tokens


def native_logprobs(
    functions: NativeFunctions, logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int
) -> Logprobs:
    """Implements `Ops.logprobs`. Raises ValueError for tensors that are not as it says."""
    count, size = len(rows), logits.shape[1]
    _checked(logits, tuple(logits.shape), torch.float32)
    _checked(rows, (count,), torch.int64)
    _checked(tokens, (count,), torch.int64)
    if not 0 <= num_top <= size:
        raise ValueError(f"num_top is {num_top}; it must be 0 to the vocabulary's {size}")
    result = Logprobs(
        sampled=torch.empty(count, dtype=torch.float64),
        top_ids=torch.empty((count, num_top), dtype=torch.int64),
        top=torch.empty((count, num_top), dtype=torch.float64),
    )
    functions.logprobs(
        logits.data_ptr(),
        rows.data_ptr(),
        tokens.data_ptr(),
        result.sampled.data_ptr(),
        result.top_ids.data_ptr(),
        result.top.data_ptr(),
        count,
        size,
        num_top,
    )
    return result


def _checked(values: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`values`; raises ValueError unless they are contiguous and as said."""
    if values.shape != shape or values.dtype is not dtype or not values.is_contiguous():
        raise ValueError(
            f"got {values.dtype} {list(values.shape)} with strides {list(values.stride())}; "
            f"give contiguous {dtype} {list(shape)}"
        )
    return values
