"""Copies of pages that sequences need before they run: the copies of copy-on-write."""

from collections.abc import Iterable

from pagewire.engine.batch import PageCopy
from pagewire.engine.page_pool import PagePool


class PageCopies:
    """Copies that wait for a step, and those that the running step makes before its rows run.

    Both pages of a copy are pinned until it is made, so that either sequence may end before.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._waiting: list[PageCopy] = []
        self._running: list[PageCopy] = []

    @property
    def are_waiting(self) -> bool:
        """Whether the next step has copies to make."""
        return bool(self._waiting)

    def add(self, copies: Iterable[PageCopy]) -> None:
        """To be made by the next step. Both pages have an owner."""
        for copy in copies:
            self._pool.pin(copy)
            self._waiting.append(copy)

    def begin(self) -> tuple[PageCopy, ...]:
        """Those that the step makes that begins now."""
        self._running, self._waiting = self._waiting, []
        return tuple(self._running)

    def finish(self) -> None:
        """The step has made its copies."""
        for copy in self._running:
            self._pool.unpin(copy)
        self._running.clear()

    def retry(self) -> None:
        """The step has failed: the next one makes its copies."""
        self._waiting = [*self._running, *self._waiting]
        self._running.clear()

    def drop(self) -> None:
        """All sequences that the waiting copies were for have ended."""
        for copy in self._waiting:
            self._pool.unpin(copy)
        self._waiting.clear()
