"""Brings the payloads of frames into the pages of a KV cache, whatever layout they come in.

Equal dtypes are copied byte by byte, at any two page sizes. Other floats are cast; to and from 8
bits K and V are converted as the operations of a model do it.
"""

import numpy as np
import numpy.typing as npt
import torch

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_convert import KVConversion
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.kv_transfer.retile import plan_scatter

Bytes = npt.NDArray[np.uint8]


class KVScatter:
    """Writes into one KV cache in host memory."""

    def __init__(self, cache: KVCache, heads: range | None = None) -> None:
        """`heads`: those of a payload that the cache has, where it has not all of them.

        Raises DeviceMemoryError when the cache is not in host memory.
        """
        self._heads = heads
        self._layout = cache.layout
        self._conversion = KVConversion(cache.pages, cache.layout, heads)
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
            self._conversion.write(torch.from_numpy(payload), part, source, page_table)

    def _copy(
        self, payload: Bytes, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        plan = plan_scatter(part, source, self._layout, page_table, heads=self._heads)
        for run in plan.runs:
            shape = (*plan.shape, run.length)
            into = _window(self._bytes, run.target, shape, (*plan.target_strides, 1))
            into[...] = _window(payload, run.source, shape, (*plan.source_strides, 1))


def _window(
    data: Bytes, offset: int, shape: tuple[int, int, int], strides: tuple[int, int, int]
) -> Bytes:
    """A view of `data`; numpy lets none reach beyond its end."""
    return np.ndarray(shape, np.uint8, data, offset, strides)
