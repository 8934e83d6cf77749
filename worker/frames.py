"""Frames between pages and buffers, in the I/O thread of a worker.

Gather and checksum on one side, verify and scatter on the other.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.layout import KVLayout, byte_runs
from pagewire.kv_transfer.messages import Frame

Bytes = npt.NDArray[np.uint8]


class FrameReader:
    """Gathers frames out of a page pool."""

    def __init__(self, layout: KVLayout, pool: memoryview) -> None:
        self._layout = layout
        self._pool: Bytes = np.frombuffer(pool, dtype=np.uint8)

    def read(self, frame: Frame, page_table: tuple[int, ...]) -> tuple[Frame, memoryview]:
        """The frame with its checksum, and its payload.

        A frame that is one run of the pool is sent from there; any other is gathered into a buffer
        of its own.
        """
        part = frame.part
        runs = list(byte_runs(self._layout, part, page_table))
        if len(runs) == 1:
            offset, length = runs[0]
            payload = self._pool[offset : offset + length]
        else:
            payload = np.empty(part.num_bytes(self._layout), dtype=np.uint8)
            position = 0
            for offset, length in runs:
                payload[position : position + length] = self._pool[offset : offset + length]
                position += length
        view = payload.data
        return replace(frame, checksum=checksum(view)), view


class FrameWriter:
    """Staging slots, and the way from them into a page pool."""

    def __init__(
        self, layout: KVLayout, pool: memoryview, *, num_slots: int, slot_bytes: int
    ) -> None:
        self._layout = layout
        self._pool: Bytes = np.frombuffer(pool, dtype=np.uint8)
        self._slots: Bytes = np.empty((num_slots, slot_bytes), dtype=np.uint8)

    def slot(self, index: int, length: int) -> memoryview:
        """Where a payload of `length` bytes lands."""
        return self._slots[index, :length].data

    def write(self, frame: Frame, page_table: tuple[int, ...]) -> bool:
        """Copy a landed frame into pages. False, and nothing is copied, when its bytes are bad."""
        part = frame.part
        payload = self._slots[frame.slot, : part.num_bytes(self._layout)]
        if checksum(payload.data) != frame.checksum:
            return False
        position = 0
        for offset, length in byte_runs(self._layout, part, page_table):
            self._pool[offset : offset + length] = payload[position : position + length]
            position += length
        return True
