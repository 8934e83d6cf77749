"""Frames from transports through staging slots into pages, where they cannot land in pages."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagewire.kv_transfer.landing import CheckedLanding, Landing
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.kv_transfer.messages import Frame

Bytes = npt.NDArray[np.uint8]


class WritablePages(Protocol):
    """The pages of a worker: of several ranks, or of a device."""

    layout: KVLayout

    def write(
        self, payload: Bytes, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Put `payload`, which is `part` in the layout `source`, into the pages of a sequence.

        It is there when this returns. Slots that the page table does not reach are left out.
        """


class SlotFrameWriter:
    """Implements `pagewire.worker.frames.PageWriter`.

    Every frame lands in its slot. One that is to lie in pages once it is sound is copied there when
    it has been found so.
    """

    def __init__(self, pages: WritablePages, slots: Bytes) -> None:
        """slots: [number of slots, bytes of a slot]."""
        self._pages = pages
        self._slots = slots
        # Of the frame that came last, by slot: its landing, and its pages where it is to lie there.
        self._landings: dict[int, CheckedLanding] = {}
        self._page_tables: dict[int, tuple[int, ...]] = {}

    def land_in_slot(self, frame: Frame, num_bytes: int) -> Landing:
        self._page_tables.pop(frame.slot, None)
        landing = CheckedLanding(self._slots[frame.slot, :num_bytes].data)
        self._landings[frame.slot] = landing
        return landing

    def land_in_pages(self, frame: Frame, page_table: tuple[int, ...]) -> Landing:
        landing = self.land_in_slot(frame, frame.part.num_bytes(self._pages.layout))
        self._page_tables[frame.slot] = page_table
        return landing

    def has_checksum(self, frame: Frame) -> bool:
        return frame.slot not in self._page_tables and self._landings[frame.slot].is_full

    def is_sound(self, frame: Frame) -> bool:
        page_table = self._page_tables.pop(frame.slot, None)
        if page_table is not None:
            return self.write(frame, self._pages.layout, page_table)
        return self._landings[frame.slot].checksum() == frame.checksum

    def write(self, frame: Frame, source: KVLayout, page_table: tuple[int, ...]) -> bool:
        if self._landings[frame.slot].checksum() != frame.checksum:
            return False
        payload = self._slots[frame.slot, : frame.part.num_bytes(source)]
        self._pages.write(payload, frame.part, source, page_table)
        return True
