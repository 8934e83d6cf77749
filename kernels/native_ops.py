"""Every operation in C++, on a CPU: one pass over memory each, with the threads of torch.

Tensors are handed over as addresses, so what the kernels rely on and a caller could get wrong is
checked here.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.native_attention import NativeAttentionPlan
from pagewire.kernels.native_library import DTYPE_CODES, NativeLibrary
from pagewire.kernels.native_recorder import NativeRecorder
from pagewire.kernels.native_sampling import NativeSamplingPlan, native_logprobs
from pagewire.kernels.ops import (
    Activation,
    AttentionBatch,
    GroupedActivation,
    Logprobs,
    SamplingPlan,
    SamplingRows,
)
from pagewire.kernels.quantized import GROUP_BYTES, num_groups


class NativeOps:
    """Implements `pagewire.kernels.ops.Ops` for float32, bfloat16 and float16.

    Each raises ValueError for tensors of mixed or other dtypes, or not laid out as it needs them.
    """

    def __init__(self, library: NativeLibrary, *, deterministic: bool = False) -> None:
        """With `deterministic` a token's attention is the same to the bit however its row is cut
        into steps; tokens of decode take longer.
        """
        self._functions = library.functions
        self._deterministic = deterministic
        self._recorder = NativeRecorder(library.functions, self.plan_attention)

    @property
    def recorder(self) -> NativeRecorder:
        return self._recorder

    def quantize(self, x: Tensor) -> GroupedActivation:
        rows, dim = x.shape
        x = x.contiguous()
        quantized = _empty_activation(rows, dim)
        self._functions.quantize(_code(x), x.data_ptr(), quantized.groups.data_ptr(), rows, dim)
        return quantized

    @overload
    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool) -> Activation: ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> Activation:
        code = _code(x, weight)
        rows = x[:, None] if x.dim() == 2 else x.flatten(1, -2)  # [outer, inner, dim]
        outer, inner, dim = rows.shape
        if rows.stride(2) != 1:
            rows = rows.contiguous()
        result, addresses = _output(x.shape, x.dtype, quantize)
        self._functions.rms_norm(
            code,
            rows.data_ptr(),
            rows.stride(0),
            rows.stride(1),
            weight.data_ptr(),
            *addresses,
            outer,
            inner,
            dim,
            eps,
        )
        return result

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> tuple[Activation, Tensor]:
        code = _code(x, residual, weight)
        rows, dim = x.shape
        x, residual = x.contiguous(), residual.contiguous()
        result, addresses = _output(x.shape, x.dtype, quantize)
        self._functions.add_rms_norm(
            code,
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            *addresses,
            rows,
            dim,
            eps,
        )
        return result, residual

    def silu_mul(self, gate_up: Tensor, *, quantize: bool = False) -> Activation:
        rows, both = gate_up.shape
        gate_up = gate_up.contiguous()
        result, addresses = _output((rows, both // 2), gate_up.dtype, quantize)
        self._functions.silu_mul(_code(gate_up), gate_up.data_ptr(), *addresses, rows, both // 2)
        return result

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
        pool: KVPool,
        layer: int,
        slots: Tensor,
    ) -> Tensor:
        code = _code(q, k, v)
        pool.require(k.dtype, quantized=(torch.int8,))
        num_tokens, num_heads, head_dim = q.shape
        _, num_layers, num_kv_heads, _, page_size, _ = pool.values.shape
        q, k, v = (_with_whole_tokens(x) for x in (q, k, v))
        cosine, sine = rope[0].contiguous(), rope[1].contiguous()
        slots = slots.contiguous()
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype)
        self._functions.rope_and_store(
            code,
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            cosine.data_ptr(),
            sine.data_ptr(),
            pool.values.data_ptr(),
            slots.data_ptr(),
            out.data_ptr(),
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            num_layers,
            layer,
            page_size,
            pool.segment_bytes,
            pool.scales is not None,
        )
        return out

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> NativeAttentionPlan:
        return NativeAttentionPlan(
            self._functions,
            batch,
            scale=scale,
            window=window,
            deterministic=self._deterministic,
        )

    def plan_sampling(self, rows: SamplingRows) -> SamplingPlan:
        return NativeSamplingPlan(self._functions, rows)

    def logprobs(self, logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        return native_logprobs(self._functions, logits, rows, tokens, num_top)


def _code(first: Tensor, *others: Tensor) -> int:
    """The dtype that all of them have, as C++ knows it."""
    dtype = first.dtype
    if dtype not in DTYPE_CODES or any(other.dtype is not dtype for other in others):
        given = ", ".join(str(tensor.dtype) for tensor in (first, *others))
        raise ValueError(
            f"got {given}; give all in one dtype of {', '.join(map(str, DTYPE_CODES))}"
        )
    return DTYPE_CODES[dtype]


def _output(
    shape: tuple[int, ...], dtype: torch.dtype, quantize: bool
) -> tuple[Activation, tuple[int | None, int | None]]:
    """Memory for a result, and its addresses as `Output` of rows.h takes them."""
    if not quantize:
        out = torch.empty(shape, dtype=dtype)
        return out, (out.data_ptr(), None)
    activation = _empty_activation(*shape)
    return activation, (None, activation.groups.data_ptr())


def _empty_activation(rows: int, dim: int) -> GroupedActivation:
    groups = torch.empty((rows, num_groups(dim), GROUP_BYTES), dtype=torch.uint8)
    return GroupedActivation(groups=groups, num_features=dim)


def _with_whole_tokens(x: Tensor) -> Tensor:
    """x, copied unless its heads lie behind one another; [num_tokens, num_heads, head_dim]."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
