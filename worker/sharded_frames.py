"""Frames between the page pools of several ranks and transports, in the I/O thread of rank 0."""

from dataclasses import replace

import numpy as np

from pagewire.engine.kv_shards import KVShards
from pagewire.kv_transfer.checksum import checksum
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
    """Implements PageWriter."""

    def __init__(self, shards: KVShards, *, num_slots: int, slot_bytes: int) -> None:
        self._shards = shards
        self._slots = np.empty((num_slots, slot_bytes), dtype=np.uint8)

    def slot(self, index: int, length: int) -> memoryview:
        return self._slots[index, :length].data

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        payload = self._slots[frame.slot, : frame.part.num_bytes(source)]
        if checksum(payload.data) != frame.checksum:
            return False
        self._shards.write(payload, frame.part, source, page_table)
        return True
