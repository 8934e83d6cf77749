"""Pages that a running step still uses although their sequence has ended."""

from collections.abc import Sequence

from pagewire.engine.page_pool import PagePool


class OrphanedPages:
    """Pins the pages of sequences that end during a step, until the step is over.

    Only these are ever pinned for a step, so a step without an abort costs no bookkeeping per page.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: list[int] = []

    def adopt(self, pages: Sequence[int]) -> None:
        """The owner of `pages` is about to release them in the middle of a step."""
        self._pool.pin(pages)
        self._pages += pages

    def take_over(self, other: "OrphanedPages") -> None:
        """Hold the pages of another step, which is void, until this one's is over."""
        self._pages += other._pages
        other._pages.clear()

    def free(self) -> None:
        """The step is over."""
        self._pool.unpin(self._pages)
        self._pages.clear()
