"""Pages that frames are being written into: pinned for as long as anything may write there. Pure.

A frame is known by the slot that it came with as credit: nothing else uses that slot meanwhile.
"""

from collections.abc import Iterable, Sequence

from pagewire.engine.page_pool import PagePool


class WrittenPages:
    """Keeps the pages of each frame pinned, even when their owner lets go of them."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[int, Sequence[int]] = {}  # by slot

    def __contains__(self, slot: int) -> bool:
        """Whether pages are pinned for the frame of `slot`."""
        return slot in self._pages

    def pin(self, slot: int, pages: Sequence[int]) -> None:
        """The frame of `slot` may be written into `pages` from now on."""
        self._pool.pin(pages)
        self._pages[slot] = pages

    def unpin(self, slots: Iterable[int]) -> None:
        """The frames of `slots` are not written any more; some may have no pages."""
        for slot in slots:
            self._pool.unpin(self._pages.pop(slot, ()))
