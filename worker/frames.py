"""Frames between pages and transports, in the I/O thread of a worker.

Runs and their checksum on one side, verify and scatter on the other.
"""

from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_scatter import KVScatter
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.layout import KVLayout, byte_runs
from pagewire.kv_transfer.messages import Frame

Bytes = npt.NDArray[np.uint8]


class PageReader(Protocol):
    """Finds frames in the pages of a worker."""

    def read(
        self, frame: Frame, page_table: tuple[int, ...]
    ) -> tuple[Frame, tuple[memoryview, ...]]:
        """The frame with its checksum, and its payload: the runs that it consists of."""


class PageWriter(Protocol):
    """Staging slots, and the way from them into the pages of a worker."""

    def slot(self, index: int, length: int) -> memoryview:
        """Where a payload of `length` bytes lands."""

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        """Bring a landed frame, in the layout of its sender, into pages.

        False, and nothing is written, when its bytes are bad.
        """


class FrameReader:
    """Implements PageReader for a page pool."""

    def __init__(self, layout: KVLayout, pool: memoryview) -> None:
        self._layout = layout
        self._pool: Bytes = np.frombuffer(pool, dtype=np.uint8)

    def read(
        self, frame: Frame, page_table: tuple[int, ...]
    ) -> tuple[Frame, tuple[memoryview, ...]]:
        """Nothing is copied: the transport takes the runs from where they are."""
        runs = byte_runs(self._layout, frame.part, page_table)
        payload = tuple(self._pool[offset : offset + length].data for offset, length in runs)
        return replace(frame, checksum=checksum(*payload)), payload


class FrameWriter:
    """Implements PageWriter for one cache."""

    def __init__(self, cache: KVCache, *, num_slots: int, slot_bytes: int) -> None:
        """Raises TypeError when the cache is not in host memory."""
        self._scatter = KVScatter(cache)
        self._slots: Bytes = np.empty((num_slots, slot_bytes), dtype=np.uint8)

    def slot(self, index: int, length: int) -> memoryview:
        return self._slots[index, :length].data

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        part = frame.part
        payload = self._slots[frame.slot, : part.num_bytes(source)]
        if checksum(payload.data) != frame.checksum:
            return False
        self._scatter.write(payload, part, source, page_table)
        return True
