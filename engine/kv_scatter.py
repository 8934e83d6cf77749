"""Brings the payloads of frames into the pages of a KV cache, whatever layout they come in.

Equal dtypes are copied byte by byte, at any two page sizes. Other floats are cast; to and from 8
bits K and V are converted as the operations of a model do it.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagewire.engine.kv_cache import KVCache, view_pages
from pagewire.kernels.kv_pool import KVPool, quantize_vectors
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.kv_transfer.retile import plan_scatter, slot_runs

Bytes = npt.NDArray[np.uint8]
Index = tuple[int | slice, ...]


class KVScatter:
    """Writes into one KV cache in host memory."""

    def __init__(self, cache: KVCache, heads: range | None = None) -> None:
        """`heads`: those of a payload that the cache has, where it has not all of them.

        Raises TypeError when the cache is not in host memory.
        """
        self._heads = heads
        self._layout = cache.layout
        self._pages = cache.pages
        self._bytes: Bytes = np.frombuffer(cache.buffer(), dtype=np.uint8)

    def write(
        self, payload: Bytes, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Put `payload`, which is `part` in the layout `source`, into the pages of a sequence.

        The layouts must hold the same KV, `heads` apart. Slots that the page table does not reach
        are left out.
        """
        if source.dtype == self._layout.dtype:
            self._copy(payload, part, source, page_table)
        else:
            self._convert(payload, part, source, page_table)

    def _copy(
        self, payload: Bytes, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        plan = plan_scatter(part, source, self._layout, page_table, heads=self._heads)
        for run in plan.runs:
            shape = (*plan.shape, run.length)
            into = _window(self._bytes, run.target, shape, (*plan.target_strides, 1))
            into[...] = _window(payload, run.source, shape, (*plan.source_strides, 1))

    def _convert(
        self, payload: Bytes, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        data = torch.from_numpy(payload).view(part.num_pages, -1)
        incoming = view_pages(data, source, num_layers=part.num_layers)
        layers = slice(part.first_layer, part.first_layer + part.num_layers)
        everything = slice(None)
        heads = slice(self._heads.start, self._heads.stop) if self._heads else everything
        for run in slot_runs(part, source, self._layout, page_table):
            source_slots = slice(run.source_slot, run.source_slot + run.num_slots)
            slots = slice(run.slot, run.slot + run.num_slots)
            vectors = _load(
                incoming, (run.source_page, everything, heads, everything, source_slots)
            )
            self._store(vectors, (run.page, layers, everything, everything, slots))

    def _store(self, vectors: Tensor, at: Index) -> None:
        """vectors: as `_load` returns them."""
        if self._pages.scales is None:
            self._pages.values[at] = vectors
            return
        self._pages.values[at], self._pages.scales[at] = quantize_vectors(
            vectors.float(), self._pages.values.dtype
        )


def _window(
    data: Bytes, offset: int, shape: tuple[int, int, int], strides: tuple[int, int, int]
) -> Bytes:
    """A view of `data`; numpy lets none reach beyond its end."""
    return np.ndarray(shape, np.uint8, data, offset, strides)


def _load(pool: KVPool, at: Index) -> Tensor:
    """Floats [num_layers, num_kv_heads, 2 (K, V), num_slots, head_dim]."""
    values = pool.values[at]
    return values if pool.scales is None else values.float().mul_(pool.scales[at][..., None])
