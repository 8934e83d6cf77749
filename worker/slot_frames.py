"""Frames from transports through staging slots into pages, where they cannot land in pages."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.kv_transfer.messages import Frame
from pagewire.worker.frames import PageWriter
from pagewire.worker.slot_memory import SlotMemory

DataT = TypeVar("DataT")
WrittenT = TypeVar("WrittenT", contravariant=True)


class WritablePages(Protocol[WrittenT]):
    """The pages of a worker: of several ranks, or of a device."""

    layout: KVLayout

    def write(
        self, payload: WrittenT, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Put `payload`, which is `part` in the layout `source`, into the pages of a sequence.

        It is there when this returns. Slots that the page table does not reach are left out.
        """


class SlotFrameWriter(Generic[DataT]):
    """Implements `pagewire.worker.frames.PageWriter`.

    Every frame lands in its slot. One that is to lie in pages once it is sound is copied there when
    it has been found so.
    """

    def __init__(self, pages: WritablePages[DataT], slots: SlotMemory[DataT]) -> None:
        self._pages = pages
        self._slots = slots
        # Of the frame that came last, by slot, where it is to lie in pages once it is sound.
        self._page_tables: dict[int, tuple[int, ...]] = {}

    def land_in_slot(self, frame: Frame, num_bytes: int) -> Landing:
        self._page_tables.pop(frame.slot, None)
        return self._slots.land(frame.slot, num_bytes)

    def land_in_pages(self, frame: Frame, page_table: tuple[int, ...]) -> Landing:
        landing = self.land_in_slot(frame, frame.part.num_bytes(self._pages.layout))
        self._page_tables[frame.slot] = page_table
        return landing

    def has_checksum(self, frame: Frame) -> bool:
        return frame.slot not in self._page_tables and self._slots.has_checksum(frame.slot)

    def is_sound(self, frame: Frame) -> bool:
        page_table = self._page_tables.pop(frame.slot, None)
        if page_table is not None:
            return self.write(frame, self._pages.layout, page_table)
        return self._slots.checksum(frame.slot) == frame.checksum

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        if self._slots.checksum(frame.slot) != frame.checksum:
            return False
        self._pages.write(self._slots.data(frame.slot), frame.part, source, page_table)
        return True


class FrameWriterByPeer:
    """Implements `pagewire.worker.frames.PageWriter` with two others, of host and device memory."""

    def __init__(
        self, *, host: PageWriter, device: PageWriter, is_direct: Callable[[bytes], bool]
    ) -> None:
        """`is_direct`: whether frames from that peer come from device to device."""
        self._host = host
        self._device = device
        self._is_direct = is_direct
        self._writers: dict[int, PageWriter] = {}  # by slot, of the frame that came last

    def land_in_slot(self, frame: Frame, num_bytes: int) -> Landing:
        return self._choose(frame).land_in_slot(frame, num_bytes)

    def land_in_pages(self, frame: Frame, page_table: tuple[int, ...]) -> Landing:
        return self._choose(frame).land_in_pages(frame, page_table)

    def has_checksum(self, frame: Frame) -> bool:
        return self._writers[frame.slot].has_checksum(frame)

    def is_sound(self, frame: Frame) -> bool:
        return self._writers[frame.slot].is_sound(frame)

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        return self._writers[frame.slot].write(frame, source, page_table)

    def _choose(self, frame: Frame) -> PageWriter:
        is_direct = self._is_direct(frame.id.sender)
        writer = self._writers[frame.slot] = self._device if is_direct else self._host
        return writer
