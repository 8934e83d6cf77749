"""Who owns which page of KV cache. Pure bookkeeping: the bytes live elsewhere.

A page has owners (sequences that refer to it) and pins (operations that read or write it right
now). Its state follows from these, so a page that loses its owner under a running operation is
quarantined, and free only once that operation has ended: never by a time-out. A page that the
prefix cache knows is not free but cached when nobody uses it, until the pool needs it.

    owners  pins    in the prefix cache    state
    0       0       no                     free
    0       0       yes                    cached
    > 0     0       either                 owned
    > 0     > 0     either                 pinned
    0       > 0     either                 quarantined
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum


class OutOfPages(Exception):
    """More pages were asked for than are neither in use nor promised."""


class IntegrityError(AssertionError):
    """The books of a pool do not balance: a fault of the program."""


class PageState(IntEnum):
    FREE = 0
    OWNED = 1
    PINNED = 2
    QUARANTINED = 3
    CACHED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Pages by state; the five sum to `total`."""

    free: int
    cached: int
    owned: int
    pinned: int
    quarantined: int
    total: int


@dataclass(slots=True, eq=False)
class Reservation:
    """Pages promised to one request but not yet allocated: a count, no pages."""

    num_pages: int


class PagePool:
    """Allocates pages, counts their owners and pins, and keeps promises.

    Promised pages stay free or cached until they are taken, but nobody else can allocate them.
    Cached pages count as available: when free ones run short, the evictor is asked for them.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a pool needs at least 1 page")
        self._owners = [0] * num_pages
        self._pins = [0] * num_pages
        self._generations = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: warm pages are used again first
        self._is_cached = [False] * num_pages
        self._evict: Callable[[int], None] | None = None
        self._promised = 0
        self._counts = [num_pages, 0, 0, 0, 0]  # by PageState

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    @property
    def num_available(self) -> int:
        """Pages that nobody uses, cached ones among them, and that are not promised to anybody."""
        return len(self._free) + self._counts[PageState.CACHED] - self._promised

    def set_evictor(self, evict: Callable[[int], None]) -> None:
        """`evict(n)` has to uncache n cached pages; it is called when free pages run short."""
        self._evict = evict

    def reserve(self, num_pages: int) -> Reservation:
        """Promise `num_pages`. Raises OutOfPages."""
        self._require(num_pages)
        self._promised += num_pages
        return Reservation(num_pages)

    def take(self, reservation: Reservation, num_pages: int) -> tuple[int, ...]:
        """Turn part of a promise into pages with one owner. Raises OutOfPages beyond it."""
        _deduct(reservation, num_pages)
        self._promised -= num_pages
        return self._pop(num_pages)

    def split(self, reservation: Reservation, num_pages: int) -> Reservation:
        """Move part of a promise to a new one. Raises OutOfPages beyond it."""
        _deduct(reservation, num_pages)
        return Reservation(num_pages)

    def cancel(self, reservation: Reservation) -> None:
        """Give back what is left of a promise. Idempotent."""
        self._promised -= reservation.num_pages
        reservation.num_pages = 0

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        """Pages with one owner. Raises OutOfPages, and then allocates none."""
        self._require(num_pages)
        return self._pop(num_pages)

    def retain(self, pages: Iterable[int]) -> None:
        """Add an owner to pages that have one or are in the prefix cache.

        Raises OutOfPages when that would use cached pages that are promised to others.
        """
        pages = tuple(pages)
        self._require(self.num_idle(pages))
        for page in pages:
            if not self._is_cached[page]:
                self._require_owner(page, "retained")
            self._change(page, owners=1)

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody uses: to retain these takes from what is available."""
        return sum(self.state(page) is PageState.CACHED for page in pages)

    def cache(self, page: int) -> None:
        """The prefix cache knows an owned page: it keeps its content when nobody uses it."""
        self._require_owner(page, "cached")
        self._change(page, is_cached=True)

    def uncache(self, page: int) -> None:
        """The prefix cache forgets a page; without owners and pins it is free."""
        if not self._is_cached[page]:
            raise IntegrityError(f"page {page} was uncached without being cached")
        self._change(page, is_cached=False)

    def is_cached(self, page: int) -> bool:
        """Whether the prefix cache knows a page, used or not."""
        return self._is_cached[page]

    def release(self, pages: Iterable[int]) -> None:
        """Remove an owner. Without owners and pins a page is free, or cached."""
        for page in pages:
            self._require_owner(page, "released")
            self._change(page, owners=-1)

    def pin(self, pages: Iterable[int]) -> None:
        """Hold pages that have an owner for an operation that reads or writes them."""
        for page in pages:
            self._require_owner(page, "pinned")
            self._change(page, pins=1)

    def unpin(self, pages: Iterable[int]) -> None:
        """The operation has ended."""
        for page in pages:
            if not self._pins[page]:
                raise IntegrityError(f"page {page} was unpinned without a pin")
            self._change(page, pins=-1)

    def state(self, page: int) -> PageState:
        if self._owners[page]:
            return PageState.PINNED if self._pins[page] else PageState.OWNED
        if self._pins[page]:
            return PageState.QUARANTINED
        return PageState.CACHED if self._is_cached[page] else PageState.FREE

    def generation(self, page: int) -> int:
        """How often the page was freed: a reference with an older generation is stale."""
        return self._generations[page]

    def counts(self) -> PageCounts:
        return PageCounts(
            free=self._counts[PageState.FREE],
            cached=self._counts[PageState.CACHED],
            owned=self._counts[PageState.OWNED],
            pinned=self._counts[PageState.PINNED],
            quarantined=self._counts[PageState.QUARANTINED],
            total=self.num_pages,
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the books balance. Looks at every page."""
        if min(self._owners) < 0 or min(self._pins) < 0:
            raise IntegrityError("a page has fewer than 0 owners or pins")
        states = [self.state(page) for page in range(self.num_pages)]
        if [states.count(state) for state in PageState] != self._counts:
            raise IntegrityError("the counts of pages by state do not match the pages")
        unused = {page for page, state in enumerate(states) if state is PageState.FREE}
        if len(self._free) != len(unused) or set(self._free) != unused:
            raise IntegrityError(
                f"{len(self._free)} pages are listed as free, {len(unused)} are unused"
            )
        num_unused = len(unused) + self._counts[PageState.CACHED]
        if not 0 <= self._promised <= num_unused:
            raise IntegrityError(
                f"{self._promised} pages are promised, {num_unused} are free or cached"
            )

    def _require(self, num_pages: int) -> None:
        if num_pages > self.num_available:
            raise OutOfPages(
                f"{num_pages} pages were asked for; {self.num_available} of {self.num_pages} are "
                "neither in use nor promised"
            )

    def _require_owner(self, page: int, verb: str) -> None:
        if not self._owners[page]:
            raise IntegrityError(f"page {page} was {verb} without an owner")

    def _pop(self, num_pages: int) -> tuple[int, ...]:
        shortage = num_pages - len(self._free)
        if shortage > 0:
            assert self._evict is not None, "only a prefix cache caches pages"
            self._evict(shortage)
        pages = tuple(self._free.pop() for _ in range(num_pages))
        for page in pages:
            self._change(page, owners=1)
        return pages

    def _change(
        self, page: int, *, owners: int = 0, pins: int = 0, is_cached: bool | None = None
    ) -> None:
        """Change what a page's state follows from; the only place that does."""
        before = self.state(page)
        self._owners[page] += owners
        self._pins[page] += pins
        if is_cached is not None:
            self._is_cached[page] = is_cached
        after = self.state(page)
        self._counts[before] -= 1
        self._counts[after] += 1
        if after is PageState.FREE:
            self._generations[page] += 1
            self._free.append(page)


def _deduct(reservation: Reservation, num_pages: int) -> None:
    if num_pages > reservation.num_pages:
        raise OutOfPages(
            f"{num_pages} pages were asked of a reservation with {reservation.num_pages} left"
        )
    reservation.num_pages -= num_pages
