"""Random inputs of attention over a poisoned pool, and how close results of kernels must come."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels import reference
from pagewire.kernels.ops import Activation, AttentionBatch, Ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def assert_close(value: Activation, expected: Tensor) -> None:
    """‖value - expected‖ / ‖expected‖; NaN fails."""
    assert isinstance(value, Tensor)
    error = (value.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[value.dtype], error


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A ragged batch over a pool."""

    rows: tuple[tuple[int, int], ...]  # (query_len, context_len)
    page_size: int = 16
    num_kv_heads: int = 2
    group: int = 3  # query heads of one KV head
    head_dim: int = 16
    num_layers: int = 3


class PagedCase:
    """Random q, k and v of a batch, with the context of each row already in a pool.

    The pool is poisoned: whatever no row owns is NaN.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.shape = shape
        page_size = shape.page_size
        num_pages = [-(-context // page_size) for _, context in shape.rows]
        free = (torch.randperm(sum(num_pages)) + 1).tolist()  # page 0 belongs to nobody
        self.pool = torch.full(
            (
                sum(num_pages) + 1,
                shape.num_layers,
                shape.num_kv_heads,
                2,
                page_size,
                shape.head_dim,
            ),
            torch.nan,
            dtype=dtype,
        )
        self.contexts = []  # [context_len, 2, num_kv_heads, head_dim] of each row
        page_table = torch.zeros(len(shape.rows), max(num_pages), dtype=torch.int32)
        positions, slots = [], []
        for index, (query_len, context_len) in enumerate(shape.rows):
            pages = torch.tensor([free.pop() for _ in range(num_pages[index])])
            page_table[index, : len(pages)] = pages
            kv = torch.randn(context_len, 2, shape.num_kv_heads, shape.head_dim).to(dtype)
            self.contexts.append(kv)
            for position in range(context_len):
                page, slot = pages[position // page_size], position % page_size
                self.pool[page, 1, :, :, slot] = kv[position].transpose(0, 1)
            new = torch.arange(context_len - query_len, context_len)
            positions.append(new)
            slots.append(pages[new // page_size] * page_size + new % page_size)
        query_lens = torch.tensor([query_len for query_len, _ in shape.rows])
        self.batch = AttentionBatch(
            cu_seqlens=torch.cat((torch.zeros(1), query_lens.cumsum(0))).int(),
            context_lens=torch.tensor([context for _, context in shape.rows], dtype=torch.int32),
            page_table=page_table,
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            page_size=page_size,
        )
        num_heads = shape.num_kv_heads * shape.group
        self.q = torch.randn(int(query_lens.sum()), num_heads, shape.head_dim).to(dtype)

    def attention(self, ops: Ops, window: int | None) -> Tensor:
        plan = ops.plan_attention(self.batch, scale=0.3, window=window)
        return plan.run(self.q, self.pool, layer=1)

    def expected(self, window: int | None) -> Tensor:
        starts = self.batch.cu_seqlens.tolist()
        return torch.cat(
            [
                reference.attention(self.q[start:end], kv[:, 0], kv[:, 1], scale=0.3, window=window)
                for start, end, kv in zip(starts, starts[1:], self.contexts, strict=False)
            ]
        )
