"""The pages of a KV cache in the memory of a device, as frames see them: reached by copies.

Plain copies do: a page's layers are one run, and runs of 48 KiB to some MiB keep a copy engine
busy, which a step does not use. A kernel that gathers them would take cores from it.
"""

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

    def __init__(self, cache: KVCache, copies: CopyStream) -> None:
        """`copies`: of the device on which the cache is."""
        self.layout = cache.layout
        self._copies = copies
        self._pool = cache.pool.view(-1)  # uint8 [bytes of all pages]
        self._conversion = KVConversion(cache.pages, cache.layout)

    def gather(
        self,
        part: FrameRange,
        page_table: tuple[int, ...],
        into: Tensor,
        after: Completion | None = None,
    ) -> Completion:
        """Begin to copy `part` of a sequence out of its pages, once `after` has come.

        into: uint8 [bytes of the part], in memory of the stream, its host's or its device's.
        """
        return self._copies.begin(partial(self._read, part, page_table, into), after=after)

    def write(
        self,
        payload: Bytes | Tensor,
        part: FrameRange,
        source: KVLayout,
        page_table: tuple[int, ...],
    ) -> None:
        """Put `payload`, which is `part` in the layout `source`, into the pages of a sequence.

        payload: uint8 [bytes of the part] in memory of the stream, its device's if it is a tensor.
        The layouts must hold the same KV; slots that the page table does not reach are left out. It
        is there when this returns.
        """
        scatter = self._write if source == self.layout else self._convert
        staged = payload if isinstance(payload, Tensor) else torch.from_numpy(payload)
        work = partial(scatter, staged, part, source, page_table)
        self._copies.begin(work).wait()

    def _read(self, part: FrameRange, page_table: tuple[int, ...], into: Tensor) -> None:
        position = 0
        for offset, length in byte_runs(self.layout, part, page_table):
            run = self._pool[offset : offset + length]
            into[position : position + length].copy_(run, non_blocking=True)
            position += length

    def _write(
        self, payload: Tensor, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        position = 0
        for offset, length in byte_runs(source, part, page_table):
            run = payload[position : position + length]
            self._pool[offset : offset + length].copy_(run, non_blocking=True)
            position += length

    def _convert(
        self, payload: Tensor, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Whole to the device first, where it is brought into the layout of the pages."""
        staged = payload.to(self._pool.device, non_blocking=True)
        if source.dtype != self.layout.dtype:
            self._conversion.write(staged, part, source, page_table)
            return
        plan = plan_scatter(part, source, self.layout, page_table)
        for run in plan.runs:
            shape = (*plan.shape, run.length)
            into = _window(self._pool, run.target, shape, (*plan.target_strides, 1))
            into.copy_(_window(staged, run.source, shape, (*plan.source_strides, 1)))


def _window(
    data: Tensor, offset: int, shape: tuple[int, int, int], strides: tuple[int, int, int]
) -> Tensor:
    """A view of `data`, uint8 [bytes]; torch lets none reach beyond the end of its memory."""
    return data.as_strided(shape, strides, data.storage_offset() + offset)
