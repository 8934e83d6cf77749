"""Frames between pages and transports.

Runs and their checksum on one side; landing, verification and scatter on the other.
"""

from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_scatter import KVScatter
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.landing import CheckedLanding, Landing
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
    """Where frames land in a worker, and the way from staging slots into its pages."""

    def land_in_slot(self, frame: Frame, num_bytes: int) -> Landing:
        """Where the payload of `frame` lands when `write` is to bring it into pages."""

    def land_in_pages(self, frame: Frame, page_table: tuple[int, ...]) -> Landing:
        """Where a payload in the worker's own layout lands that is to lie in these pages.

        It does, once `is_sound` has found so.
        """

    def has_checksum(self, frame: Frame) -> bool:
        """Whether the checksum was made while the frame landed: `is_sound` then takes no time."""

    def is_sound(self, frame: Frame) -> bool:
        """Whether the bytes that have landed are those that were sent."""

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        """Bring a frame that landed in its slot, in the layout of its sender, into pages.

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
    """Implements PageWriter for one cache: a frame of its layout lands in pages."""

    def __init__(self, cache: KVCache, *, num_slots: int, slot_bytes: int) -> None:
        """Raises DeviceMemoryError when the cache is not in host memory."""
        self._layout = cache.layout
        self._pool: Bytes = np.frombuffer(cache.buffer(), dtype=np.uint8)
        self._scatter = KVScatter(cache)
        # Takes memory only where a frame lands, which is none where all workers have one layout.
        self._slots: Bytes = np.empty((num_slots, slot_bytes), dtype=np.uint8)
        self._landings: dict[int, CheckedLanding] = {}  # of the frame that came last, by slot

    def land_in_slot(self, frame: Frame, num_bytes: int) -> Landing:
        return self._land(frame, [self._slots[frame.slot, :num_bytes].data])

    def land_in_pages(self, frame: Frame, page_table: tuple[int, ...]) -> Landing:
        runs = byte_runs(self._layout, frame.part, page_table)
        return self._land(
            frame, [self._pool[offset : offset + length].data for offset, length in runs]
        )

    def has_checksum(self, frame: Frame) -> bool:
        return self._landings[frame.slot].is_full

    def is_sound(self, frame: Frame) -> bool:
        return self._landings[frame.slot].checksum() == frame.checksum

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        if not self.is_sound(frame):
            return False
        payload = self._slots[frame.slot, : frame.part.num_bytes(source)]
        self._scatter.write(payload, frame.part, source, page_table)
        return True

    def _land(self, frame: Frame, parts: list[memoryview]) -> Landing:
        landing = self._landings[frame.slot] = CheckedLanding(*parts)
        return landing
