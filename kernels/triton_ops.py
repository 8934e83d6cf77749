"""Every operation in Triton where it has a kernel, on CUDA or in Triton's interpreter.

Matrices in floating point remain torch's, by design, which gives them to cuBLAS; where results must
be the same to the bit in every batch, `invariant_matmul` multiplies them.
"""

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from pagewire.kernels.gpu import sampling
from pagewire.kernels.gpu.activation_quant import quantize_tokens
from pagewire.kernels.gpu.decode_attention import choose_num_splits, decode_attention
from pagewire.kernels.gpu.graph_recorder import Capture, GraphRecorder
from pagewire.kernels.gpu.launch_table import LaunchTable, launch_table
from pagewire.kernels.gpu.prefill_attention import prefill_attention
from pagewire.kernels.gpu.rms_norm import add_rms_norm, rms_norm
from pagewire.kernels.gpu.rms_norm_quant import add_rms_norm_quant, rms_norm_quant
from pagewire.kernels.gpu.rope_store import rope_and_store
from pagewire.kernels.gpu.silu_mul import silu_mul
from pagewire.kernels.gpu.silu_mul_quant import silu_mul_quant
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import (
    Activation,
    AttentionBatch,
    Logprobs,
    SamplingPlan,
    SamplingRows,
    TokenActivation,
)
from pagewire.kernels.triton_device import is_interpreted

FIRST_WITH_TMA = 9  # compute capability of Hopper
FIRST_WITH_FP8 = 8, 9  # of Ada
NUM_SMS_OF_H100 = 132


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """What of a GPU decides how kernels are launched."""

    title: str
    num_sms: int
    has_tma: bool  # a unit that fetches tiles, from Hopper on
    has_fp8: bool  # numbers of 8 bits, from Ada on


def find_gpu(device: str) -> GPU:
    """The GPU that torch names so; where kernels are interpreted, what they take for one."""
    if is_interpreted():
        return GPU(title="its interpreter", num_sms=NUM_SMS_OF_H100, has_tma=False, has_fp8=True)
    properties = torch.cuda.get_device_properties(device)
    return GPU(
        title=properties.name,
        num_sms=properties.multi_processor_count,
        has_tma=properties.major >= FIRST_WITH_TMA,
        has_fp8=(properties.major, properties.minor) >= FIRST_WITH_FP8,
    )


class TritonOps:
    """Implements `pagewire.kernels.ops.Ops` for float32, bfloat16 and float16.

    Each raises KernelArgumentError, a ValueError, for tensors that its kernel does not take, as
    heads of another size than a power of two.
    """

    def __init__(
        self,
        gpu: GPU,
        capture: Capture | None = None,
        activations: torch.dtype = torch.int8,
        launches: LaunchTable | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        """`capture` makes recordings of decode steps; None: each launches anew.

        `activations`: int8 or float8_e4m3fn, what activations are quantised to. `launches` None: as
        was measured for such a GPU. With `deterministic` a token's attention is the same to the bit
        however its row is cut into steps, as everything else here is.
        """
        self._gpu = gpu
        self._activations = activations
        self._launches = launches or launch_table(gpu.title)
        self._deterministic = deterministic
        self._recorder = GraphRecorder(self.plan_attention, capture) if capture else None

    @property
    def recorder(self) -> GraphRecorder | None:
        return self._recorder

    def quantize(self, x: Tensor) -> TokenActivation:
        return _activation(*quantize_tokens(x, self._activations))

    @overload
    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool) -> Activation: ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> Activation:
        if not quantize:
            return rms_norm(x, weight, eps)
        return _activation(*rms_norm_quant(x, weight, eps, self._activations))

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> tuple[Activation, Tensor]:
        if not quantize:
            return add_rms_norm(x, residual, weight, eps)
        normed = add_rms_norm_quant(x, residual, weight, eps, self._activations)
        return _activation(*normed), residual

    def silu_mul(self, gate_up: Tensor, *, quantize: bool = False) -> Activation:
        if not quantize:
            return silu_mul(gate_up)
        return _activation(*silu_mul_quant(gate_up, self._activations))

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
        return rope_and_store(q, k, v, rope, pool, layer, slots)

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> "TritonAttentionPlan":
        return TritonAttentionPlan(
            batch=batch,
            scale=scale,
            window=window,
            gpu=self._gpu,
            launches=self._launches,
            deterministic=self._deterministic,
        )

    def plan_sampling(self, rows: SamplingRows) -> SamplingPlan:
        return sampling.TritonSamplingPlan(rows)

    def logprobs(self, logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        return sampling.logprobs(logits, rows, tokens, num_top)


def _activation(values: Tensor, scales: Tensor) -> TokenActivation:
    return TokenActivation(values=values, scales=scales)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TritonAttentionPlan:
    """Implements `pagewire.kernels.ops.AttentionPlan`.

    Decided by shapes alone: the host does not wait for lengths, and a CUDA graph can replay it.
    The splits of decode sum in an order of their own, so `deterministic` rows go another way.
    """

    batch: AttentionBatch
    scale: float
    window: int | None
    gpu: GPU
    launches: LaunchTable
    deterministic: bool

    def run(self, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        num_rows = len(self.batch.page_table)
        # In float32 the tiles of decode do not fit into registers.
        if len(q) > num_rows or q.dtype is torch.float32 or self.deterministic:
            return prefill_attention(
                q,
                pool,
                layer,
                self.batch,
                scale=self.scale,
                window=self.window,
                invariant=self.deterministic,
                tma=self.gpu.has_tma,
                launch=self.launches.prefill_attention,
            )
        num_pages, _, num_kv_heads, *_ = pool.values.shape
        return decode_attention(
            q,
            pool,
            layer,
            self.batch,
            scale=self.scale,
            window=self.window,
            num_splits=choose_num_splits(num_rows, num_kv_heads, num_pages, self.gpu.num_sms),
            tma=self.gpu.has_tma,
            launch=self.launches.decode_attention,
        )
