"""The pages of a KV cache in the memory of a device, as frames see them: reached by copies.

Plain copies do: a page's layers are one run, and runs of 48 KiB to some MiB keep a copy engine
busy, which a step does not use. A kernel that gathers them would take cores from it.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagewire.engine.copy_stream import Completion, CopyStream
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_convert import KVConversion
from pagewire.kv_transfer.layout import FrameRange, KVLayout, byte_runs
from pagewire.kv_transfer.retile import plan_scatter

Bytes = npt.NDArray[np.uint8]


class DevicePages:
    """Copies parts of sequences between the pages of one cache and host memory.

    For use by one thread. Both ends of a copy must be left alone until it is complete.
    """

    def __init__(
        self,
        cache: KVCache,
        copies: CopyStream,
        *,
        layout: KVLayout | None = None,
        heads: range | None = None,
    ) -> None:
        """`copies`: of the device on which the cache is. Of one rank of several: the `layout` of a
        page with all KV heads, which is that of payloads, and the `heads` of it that are here.
        """
        self.layout = layout or cache.layout
        self._own_layout = cache.layout
        self._heads = heads
        self._copies = copies
        self._pool = cache.pool.view(-1)  # uint8 [bytes of all pages]
        self._conversion = KVConversion(cache.pages, cache.layout, heads)

    def gather(
        self,
        part: FrameRange,
        page_table: tuple[int, ...],
        into: Tensor,
        after: Completion | None = None,
    ) -> Completion:
        """Begin to copy `part` of a sequence out of its pages, once `after` has come.

        into: uint8 [bytes of the part], in memory of the stream, its host's or its device's. What
        belongs to heads that are not here is left alone.
        """
        return self._copies.begin(partial(self._read, part, page_table, into), after=after)

    def write(
        self,
        payload: Bytes | Tensor,
        part: FrameRange,
        source: KVLayout,
        page_table: tuple[int, ...],
    ) -> None:
        """As `begin_write`; it is there when this returns."""
        self.begin_write(payload, part, source, page_table).wait()

    def begin_write(
        self,
        payload: Bytes | Tensor,
        part: FrameRange,
        source: KVLayout,
        page_table: tuple[int, ...],
    ) -> Completion:
        """Begin to put `payload`, which is `part` in the layout `source`, into pages of a sequence.

        payload: uint8 [bytes of the part] in memory of the stream, its device's if it is a tensor.
        The layouts must hold the same KV; slots that the page table does not reach are left out.
        """
        scatter = self._write if source == self.layout else self._convert
        staged = payload if isinstance(payload, Tensor) else torch.from_numpy(payload)
        return self._copies.begin(partial(scatter, staged, part, source, page_table))

    def _read(self, part: FrameRange, page_table: tuple[int, ...], into: Tensor) -> None:
        for pages, rows in self._pieces(part, page_table, into):
            self._copies.copy_rows(rows, pages)

    def _write(
        self, payload: Tensor, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        for pages, rows in self._pieces(part, page_table, payload):
            self._copies.copy_rows(pages, rows)

    def _pieces(
        self, part: FrameRange, page_table: tuple[int, ...], payload: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What is copied at once: in the pages, and in a payload in the layout of all heads.

        Both uint8 [num_rows, num_bytes]: one row where all heads are here, as long as can be; of
        some heads one for each layer of a page.
        """
        if self._heads is None:
            position = 0
            for offset, length in byte_runs(self.layout, part, page_table):
                run = payload[position : position + length]
                yield self._pool[offset : offset + length].unsqueeze(0), run.unsqueeze(0)
                position += length
            return
        own, head_bytes = self._own_layout, self._own_layout.head_bytes
        mine = slice(self._heads.start * head_bytes, self._heads.stop * head_bytes)
        rows = payload.view(part.num_pages, part.num_layers, self.layout.layer_bytes)[:, :, mine]
        for index in range(part.num_pages):
            page = page_table[part.first_page + index]
            first = page * own.page_bytes + part.first_layer * own.layer_bytes
            run = self._pool[first : first + part.num_layers * own.layer_bytes]
            yield run.view(part.num_layers, own.layer_bytes), rows[index]

    def _convert(
        self, payload: Tensor, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Whole to the device first, where it is brought into the layout of the pages."""
        staged = payload.to(self._pool.device, non_blocking=True)
        if source.dtype != self.layout.dtype:
            self._conversion.write(staged, part, source, page_table)
            return
        plan = plan_scatter(part, source, self._own_layout, page_table, heads=self._heads)
        for run in plan.runs:
            shape = (*plan.shape, run.length)
            into = _window(self._pool, run.target, shape, (*plan.target_strides, 1))
            into.copy_(_window(staged, run.source, shape, (*plan.source_strides, 1)))


def _window(
    data: Tensor, offset: int, shape: tuple[int, int, int], strides: tuple[int, int, int]
) -> Tensor:
    """A view of `data`, uint8 [bytes]; torch lets none reach beyond the end of its memory."""
    return data.as_strided(shape, strides, data.storage_offset() + offset)
