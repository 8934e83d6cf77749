"""Random inputs of attention over a poisoned pool, and how close results of kernels must come."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels import reference
from pagewire.kernels.kv_pool import QUANTIZED, KVPool, quantize_vectors
from pagewire.kernels.ops import Activation, AttentionBatch, Ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def assert_close(value: Activation, expected: Tensor, tolerance: float | None = None) -> None:
    """‖value - expected‖ / ‖expected‖ is at most that of the dtype; NaN fails."""
    assert isinstance(value, Tensor)
    error = (value.double() - expected).norm() / expected.norm()
    assert error <= (tolerance or TOLERANCE[value.dtype]), error


def poisoned_pool(
    num_pages: int,
    dtype: torch.dtype,
    *,
    num_layers: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
) -> KVPool:
    """A pool of which everything is NaN; in 8 bits the scales are."""
    value_bytes = head_dim * dtype.itemsize + (4 if dtype in QUANTIZED else 0)
    page_bytes = num_layers * num_kv_heads * 2 * page_size * value_bytes
    pool = KVPool(
        torch.zeros((num_pages, page_bytes), dtype=torch.uint8),
        dtype,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        head_dim=head_dim,
    )
    (pool.values if pool.scales is None else pool.scales).fill_(torch.nan)
    return pool


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

    The pool is poisoned: whatever no row owns is NaN. With `quantized` it has 8 bits.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, seed: int = 0, *, quantized: bool = False
    ) -> None:
        torch.manual_seed(seed)
        self.shape = shape
        page_size = shape.page_size
        num_pages = [-(-context // page_size) for _, context in shape.rows]
        free = (torch.randperm(sum(num_pages)) + 1).tolist()  # page 0 belongs to nobody
        self.pool = poisoned_pool(
            sum(num_pages) + 1,
            torch.int8 if quantized else dtype,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            page_size=page_size,
            head_dim=shape.head_dim,
        )
        self.exact_contexts = []  # [context_len, 2, num_kv_heads, head_dim] of each row
        self.contexts = []  # the same, as the pool holds it
        page_table = torch.zeros(len(shape.rows), max(num_pages), dtype=torch.int32)
        positions, slots = [], []
        for index, (query_len, context_len) in enumerate(shape.rows):
            pages = torch.tensor([free.pop() for _ in range(num_pages[index])])
            page_table[index, : len(pages)] = pages
            kv = torch.randn(context_len, 2, shape.num_kv_heads, shape.head_dim).to(dtype)
            self.exact_contexts.append(kv)
            self.contexts.append(self._store(kv, pages))
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

    def _store(self, kv: Tensor, pages: Tensor) -> Tensor:
        """Put the context of a row into layer 1 of its pages; returns what these then hold."""
        page_size, pool = self.shape.page_size, self.pool
        values, scales = kv, torch.ones(kv.shape[:3])
        if pool.scales is not None:
            values, scales = reference.quantize(kv)
        for position in range(len(kv)):
            page, slot = pages[position // page_size], position % page_size
            pool.values[page, 1, :, :, slot] = values[position].transpose(0, 1)
            if pool.scales is not None:
                pool.scales[page, 1, :, :, slot] = scales[position].transpose(0, 1)
        return values.double() * scales[..., None]

    def attention(self, ops: Ops, window: int | None) -> Tensor:
        plan = ops.plan_attention(self.batch, scale=0.3, window=window)
        return plan.run(self.q, self.pool, layer=1)

    def expected(self, window: int | None, *, exact: bool = False) -> Tensor:
        """From what the pool holds, or with `exact` from what it should hold."""
        starts = self.batch.cu_seqlens.tolist()
        contexts = self.exact_contexts if exact else self.contexts
        return torch.cat(
            [
                reference.attention(self.q[start:end], kv[:, 0], kv[:, 1], scale=0.3, window=window)
                for start, end, kv in zip(starts, starts[1:], contexts, strict=False)
            ]
        )


def in_fp8(case: PagedCase) -> PagedCase:
    """The case over a pool in fp8; what nobody has written is NaN in values and in scales."""
    floats, shape = case.pool.values, case.shape
    pool = poisoned_pool(
        len(floats),
        torch.float8_e4m3fn,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        page_size=shape.page_size,
        head_dim=shape.head_dim,
    )
    assert pool.scales is not None
    values, scales = quantize_vectors(floats.float(), torch.float8_e4m3fn)
    pool.values.copy_(values)
    pool.scales.copy_(scales)
    case.pool = pool
    quantized = [quantize_vectors(kv.float(), torch.float8_e4m3fn) for kv in case.exact_contexts]
    case.contexts = [values.double() * scales[..., None] for values, scales in quantized]
    return case
