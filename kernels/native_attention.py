"""Paged attention in C++: cuts the rows of a step into work items, once for all layers.

A prompt chunk becomes tiles of query tokens, a row of decode becomes parts of its context. How a
row is cut depends on nothing but its own length, so its result does not depend on the rows beside
it or on the number of threads; that of a chunk's token not on the cuts between chunks either.
Decode sums in another order than a chunk, unless results have to be deterministic: then every row
is a chunk.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.native_library import DTYPE_CODES, NativeFunctions
from pagewire.kernels.ops import AttentionBatch

# Query rows (tokens times the query heads of one KV head) of a tile: K and V are read once for all.
# A multiple of the widest panel of attention_tile.h.
TILE_ROWS = 144

# Rows of at most this many tokens, as of decode and speculation, are cut along their context.
MAX_SPLIT_TOKENS = 8
# Positions of a part: parts keep threads busy when there are few rows, and cost a little each.
PART_LEN = 512

# Stands for no window: longer than any context, and 32-bit positions minus it do not overflow.
UNBOUNDED = 2**30


class AttentionStep(ctypes.Structure):
    """struct Step of attention.cpp, where its fields are explained."""

    _fields_ = (
        ("dtype", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("segment_bytes", ctypes.c_int64),
        ("quantized", ctypes.c_int64),
        ("page_table", ctypes.c_void_p),
        ("max_pages", ctypes.c_int64),
        ("items", ctypes.c_void_p),
        ("num_items", ctypes.c_int64),
        ("merges", ctypes.c_void_p),
        ("num_merges", ctypes.c_int64),
        ("max_rows", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("parts", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("num_threads", ctypes.c_int64),
        ("part_size", ctypes.c_int64),
        ("thread_size", ctypes.c_int64),
        ("tiles_only", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """A step in the form that C++ takes, and the memory that it points to."""

    step: AttentionStep
    memory: tuple[Tensor, ...]


class _Queries(NamedTuple):
    """What the queries of all layers have in common."""

    dtype: torch.dtype
    num_heads: int
    head_dim: int
    pool: KVPool


class NativeAttentionPlan:
    """Implements `pagewire.kernels.ops.AttentionPlan`."""

    def __init__(
        self,
        functions: NativeFunctions,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None,
        deterministic: bool = False,
    ) -> None:
        self._functions = functions
        self._batch = batch
        self._scale = scale
        self._window = UNBOUNDED if window is None else min(window, UNBOUNDED)
        self._deterministic = deterministic
        self._queries: _Queries | None = None
        self._prepared: _Prepared | None = None

    def run(self, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        """Attend as `AttentionPlan.run` says.

        All layers of a step have the same shapes. Raises ValueError when the pool is neither in
        8 bits nor of q's dtype, or when there is no kernel for that.
        """
        head_dim = q.shape[2]
        if q.stride()[1:] != (head_dim, 1):
            q = q.contiguous()
        # The first layer says how many heads there are.
        if self._prepared is None:
            self._queries = _Queries(q.dtype, q.shape[1], head_dim, pool)
            self._prepared = self._prepare(self._queries, self._batch)
        out = torch.empty(q.shape, dtype=q.dtype)
        self._functions.paged_attention(
            ctypes.addressof(self._prepared.step),
            q.data_ptr(),
            q.stride(0),
            pool.values.data_ptr(),
            layer,
            out.data_ptr(),
        )
        return out

    @property
    def has_run(self) -> bool:
        return self._prepared is not None

    def renew(self, batch: AttentionBatch) -> None:
        """Implements `RenewablePlan.renew`."""
        if self._prepared is None or self._queries is None:
            raise RuntimeError("this plan has not run yet; run it once before it is renewed")
        step, new = self._prepared.step, self._prepare(self._queries, batch)
        # Recorded calls have the address of the step.
        ctypes.memmove(ctypes.addressof(step), ctypes.addressof(new.step), ctypes.sizeof(step))
        self._prepared = replace(new, step=step)

    def _prepare(self, queries: _Queries, batch: AttentionBatch) -> _Prepared:
        dtype, num_heads, head_dim, pool = queries
        if dtype not in DTYPE_CODES:
            raise ValueError(f"q is {dtype}; give one of {', '.join(map(str, DTYPE_CODES))}")
        pool.require(dtype, quantized=(torch.int8,))
        _, num_layers, num_kv_heads, _, page_size, _ = pool.values.shape
        group = num_heads // num_kv_heads
        items, merges = _cut(
            batch, group, self._window, 0 if self._deterministic else MAX_SPLIT_TOKENS
        )
        item_array, merge_array = _array(items), _array(merges)
        page_table = batch.page_table.contiguous()
        step = AttentionStep(
            dtype=DTYPE_CODES[dtype],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            num_layers=num_layers,
            segment_bytes=pool.segment_bytes,
            quantized=pool.scales is not None,
            page_table=page_table.data_ptr(),
            max_pages=page_table.shape[1],
            items=item_array.data_ptr(),
            num_items=len(items),
            merges=merge_array.data_ptr(),
            num_merges=len(merges),
            max_rows=max(item.num_tokens for item in items) * group,
            window=self._window,
            scale=self._scale,
            num_threads=torch.get_num_threads(),
            tiles_only=self._deterministic,
        )
        self._functions.attention_sizes(ctypes.byref(step))
        num_parts = sum(merge.num_parts for merge in merges)
        parts = torch.empty(num_parts * num_kv_heads * step.part_size)
        scratch = torch.empty(step.num_threads * step.thread_size)
        step.parts = parts.data_ptr()
        step.scratch = scratch.data_ptr()
        return _Prepared(step=step, memory=(page_table, item_array, merge_array, parts, scratch))


class _Item(NamedTuple):
    """Consecutive tokens of one row against a range of positions: struct Item of attention.cpp."""

    row: int
    token: int  # the first, in the ragged dimension
    num_tokens: int
    position: int  # of the first token
    begin: int
    end: int
    part: int = -1  # where the result goes when others share the tokens

    @property
    def cost(self) -> int:
        return self.num_tokens * (self.end - self.begin)


class _Merge(NamedTuple):
    """Items that share their tokens: struct Merge of attention.cpp."""

    token: int
    num_tokens: int
    first_part: int
    num_parts: int


def _cut(
    batch: AttentionBatch, group: int, window: int, max_split_tokens: int
) -> tuple[list[_Item], list[_Merge]]:
    """The work items of a step, the most costly first, and which of them belong together.

    Rows of more than `max_split_tokens` are cut along their tokens, others along their context.
    """
    items: list[_Item] = []
    merges: list[_Merge] = []
    num_parts = 0
    starts = batch.cu_seqlens.tolist()
    for row, context_len in enumerate(batch.context_lens.tolist()):
        num_tokens = starts[row + 1] - starts[row]
        whole = _Item(
            row=row,
            token=starts[row],
            num_tokens=num_tokens,
            position=context_len - num_tokens,
            begin=max(0, context_len - num_tokens - window + 1),
            end=context_len,
        )
        if num_tokens > max_split_tokens:
            items.extend(_tiles(whole, max(1, TILE_ROWS // group), window))
        elif whole.begin // PART_LEN == (whole.end - 1) // PART_LEN:
            items.append(whole)
        else:
            parts = _parts(whole, num_parts)
            items.extend(parts)
            merges.append(_Merge(whole.token, num_tokens, num_parts, len(parts)))
            num_parts += len(parts)
    items.sort(key=lambda item: item.cost, reverse=True)
    return items, merges


def _tiles(whole: _Item, tile_tokens: int, window: int) -> Iterator[_Item]:
    """Cut a row along its tokens; each tile sees the context up to its last token.

    Evenly, so that no rest is small enough for the kernel of decode: its sums have another order,
    and a token's result would depend on how its prompt is chunked.
    """
    num_tiles = -(-whole.num_tokens // tile_tokens)
    cuts = [whole.num_tokens * index // num_tiles for index in range(num_tiles + 1)]
    for first, end in pairwise(cuts):
        position = whole.position + first
        yield whole._replace(
            token=whole.token + first,
            num_tokens=end - first,
            position=position,
            begin=max(0, position - window + 1),
            end=whole.position + end,
        )


def _parts(whole: _Item, first_part: int) -> list[_Item]:
    """Cut a row along its context, at multiples of PART_LEN."""
    cuts = range(whole.begin // PART_LEN * PART_LEN, whole.end, PART_LEN)
    return [
        whole._replace(
            begin=max(whole.begin, cut), end=min(whole.end, cut + PART_LEN), part=first_part + index
        )
        for index, cut in enumerate(cuts)
    ]


def _array(rows: list[_Item] | list[_Merge]) -> Tensor:
    """int64 [len(rows), fields]: the structs as C++ reads them."""
    return torch.tensor(rows, dtype=torch.int64)
