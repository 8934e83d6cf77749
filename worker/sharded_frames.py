"""Frames out of the page pools of several ranks, in the I/O thread of rank 0."""

from dataclasses import replace

from pagewire.engine.kv_shards import KVShards
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.messages import Frame


class ShardedFrameReader:
    """Implements `pagewire.worker.frames.PageReader`."""

    def __init__(self, shards: KVShards) -> None:
        self._shards = shards

    def read(
        self, frame: Frame, page_table: tuple[int, ...]
    ) -> tuple[Frame, tuple[memoryview, ...]]:
        payload = tuple(self._shards.runs(frame.part, page_table))
        return replace(frame, checksum=checksum(*payload)), payload
