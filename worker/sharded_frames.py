"""Frames between the page pools of several ranks and transports, in the I/O thread of rank 0."""

from dataclasses import replace

import numpy as np

from pagewire.engine.kv_shards import KVShards
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.landing import CheckedLanding, Landing
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame


class ShardedFrameReader:
    """Implements PageReader."""

    def __init__(self, shards: KVShards) -> None:
        self._shards = shards

    def read(
        self, frame: Frame, page_table: tuple[int, ...]
    ) -> tuple[Frame, tuple[memoryview, ...]]:
        payload = tuple(self._shards.runs(frame.part, page_table))
        return replace(frame, checksum=checksum(*payload)), payload


class ShardedFrameWriter:
    """Implements PageWriter.

    Every frame lands in its slot, since a head may belong in the pages of several ranks; one that
    is to lie in pages once it is sound is copied there when it has been found so.
    """

    def __init__(self, shards: KVShards, *, num_slots: int, slot_bytes: int) -> None:
        self._shards = shards
        self._slots = np.empty((num_slots, slot_bytes), dtype=np.uint8)
        # Of the frame that came last, by slot: its landing, and its pages where it is to lie there.
        self._landings: dict[int, CheckedLanding] = {}
        self._page_tables: dict[int, tuple[int, ...]] = {}

    def land_in_slot(self, frame: Frame, num_bytes: int) -> Landing:
        self._page_tables.pop(frame.slot, None)
        landing = CheckedLanding(self._slots[frame.slot, :num_bytes].data)
        self._landings[frame.slot] = landing
        return landing

    def land_in_pages(self, frame: Frame, page_table: tuple[int, ...]) -> Landing:
        landing = self.land_in_slot(frame, frame.part.num_bytes(self._shards.layout))
        self._page_tables[frame.slot] = page_table
        return landing

    def has_checksum(self, frame: Frame) -> bool:
        return frame.slot not in self._page_tables and self._landings[frame.slot].is_full

    def is_sound(self, frame: Frame) -> bool:
        page_table = self._page_tables.pop(frame.slot, None)
        if page_table is not None:
            return self.write(frame, self._shards.layout, page_table)
        return self._landings[frame.slot].checksum() == frame.checksum

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        if self._landings[frame.slot].checksum() != frame.checksum:
            return False
        payload = self._slots[frame.slot, : frame.part.num_bytes(source)]
        self._shards.write(payload, frame.part, source, page_table)
        return True
