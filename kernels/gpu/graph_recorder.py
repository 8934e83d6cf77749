"""Records decode steps as graphs that a GPU replays with one launch.

A graph has the shapes and addresses of its capture. So it is captured for few numbers of rows,
each of which serves the smaller ones with rows of padding, and reads its inputs from tensors that
are refilled between replays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import AttentionBatch, AttentionPlan, Recording

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)

Capture = Callable[[Callable[[], Tensor]], Recording]


class PlanAttention(Protocol):
    """`Ops.plan_attention`, of operations that decide by the shapes of a batch alone."""

    def __call__(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> AttentionPlan: ...


class GraphRecorder:
    """Implements `pagewire.kernels.ops.StepRecorder`."""

    buckets: Sequence[int] = BUCKETS

    def __init__(self, plan_attention: PlanAttention, capture: Capture) -> None:
        """`capture` makes a recording of a step; see `StepRecorder.record`."""
        self._plan_attention = plan_attention
        self._capture = capture

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> "FixedAttentionPlan":
        plan = self._plan_attention(batch, scale=scale, window=window)
        return FixedAttentionPlan(batch=batch, plan=plan)

    def record(self, step: Callable[[], Tensor]) -> Recording:
        return self._capture(step)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FixedAttentionPlan:
    """Implements `pagewire.kernels.ops.RenewablePlan` in the memory of its first batch."""

    batch: AttentionBatch
    plan: AttentionPlan  # over `batch`
    has_run: bool = False  # a first run compiles and loads the kernels of its shapes

    def run(self, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        return self.plan.run(q, pool, layer)

    def renew(self, batch: AttentionBatch) -> None:
        num_rows, num_pages = batch.page_table.shape
        lens, page_table = self.batch.context_lens, self.batch.page_table
        lens[:num_rows].copy_(batch.context_lens)
        lens[num_rows:].fill_(1)
        # Padding reads one page of whoever had its row before.
        page_table[:num_rows, :num_pages].copy_(batch.page_table)
