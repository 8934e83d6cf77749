"""PagePool against a model of it that is too simple to be wrong."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from pagewire.engine.page_pool import (
    IntegrityError,
    OutOfPages,
    PageCounts,
    PagePool,
    PageState,
    Reservation,
)

NUM_PAGES = 6


class PoolMachine(RuleBasedStateMachine):
    """Random calls on a pool; the model counts owners, pins and promises."""

    owned = Bundle("owned")  # one entry for each owner of a page
    pinned = Bundle("pinned")  # one entry for each pin
    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.owners: Counter[int] = Counter()
        self.pins: Counter[int] = Counter()
        self.freed: Counter[int] = Counter()
        self.promises: list[Reservation] = []

    @property
    def free(self) -> list[int]:
        return [page for page in range(NUM_PAGES) if not self.owners[page] and not self.pins[page]]

    @property
    def num_promised(self) -> int:
        return sum(reservation.num_pages for reservation in self.promises)

    @rule(target=owned, num_pages=st.integers(0, NUM_PAGES + 1))
    def allocate(self, num_pages: int) -> object:
        if num_pages > len(self.free) - self.num_promised:
            with pytest.raises(OutOfPages):
                self.pool.allocate(num_pages)
            return multiple()
        return self._own(self.pool.allocate(num_pages), num_pages)

    @rule(target=reservations, num_pages=st.integers(0, NUM_PAGES + 1))
    def reserve(self, num_pages: int) -> object:
        if num_pages > len(self.free) - self.num_promised:
            with pytest.raises(OutOfPages):
                self.pool.reserve(num_pages)
            return multiple()
        reservation = self.pool.reserve(num_pages)
        self.promises.append(reservation)
        return reservation

    @rule(target=owned, reservation=reservations, num_pages=st.integers(0, NUM_PAGES + 1))
    def take(self, reservation: Reservation, num_pages: int) -> object:
        if num_pages > reservation.num_pages:
            with pytest.raises(OutOfPages):
                self.pool.take(reservation, num_pages)
            return multiple()
        before = reservation.num_pages
        pages = self.pool.take(reservation, num_pages)
        assert reservation.num_pages == before - num_pages
        return self._own(pages, num_pages)

    @rule(target=reservations, reservation=reservations, num_pages=st.integers(0, NUM_PAGES + 1))
    def split(self, reservation: Reservation, num_pages: int) -> object:
        before = reservation.num_pages
        if num_pages > before:
            with pytest.raises(OutOfPages):
                self.pool.split(reservation, num_pages)
            return multiple()
        part = self.pool.split(reservation, num_pages)
        assert (part.num_pages, reservation.num_pages) == (num_pages, before - num_pages)
        self.promises.append(part)
        return part

    @rule(reservation=reservations)
    def cancel(self, reservation: Reservation) -> None:
        self.pool.cancel(reservation)
        assert reservation.num_pages == 0

    @rule(target=owned, page=owned)
    def retain(self, page: int) -> object:
        if not self.owners[page]:
            return multiple()
        self.pool.retain([page])
        self.owners[page] += 1
        return page

    @rule(page=consumes(owned))
    def release(self, page: int) -> None:
        self.pool.release([page])
        self.owners[page] -= 1
        self._count_if_freed(page)

    @rule(target=pinned, page=owned)
    def pin(self, page: int) -> object:
        self.pool.pin([page])
        self.pins[page] += 1
        return page

    @rule(page=consumes(pinned))
    def unpin(self, page: int) -> None:
        self.pool.unpin([page])
        self.pins[page] -= 1
        self._count_if_freed(page)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def misuse_a_free_page(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.free))
        for call in (self.pool.retain, self.pool.release, self.pool.pin, self.pool.unpin):
            with pytest.raises(IntegrityError, match=f"page {page}"):
                call([page])

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        states = Counter(self._state(page) for page in range(NUM_PAGES))
        assert self.pool.counts() == PageCounts(
            free=states[PageState.FREE],
            cached=0,
            owned=states[PageState.OWNED],
            pinned=states[PageState.PINNED],
            quarantined=states[PageState.QUARANTINED],
            total=NUM_PAGES,
        )
        assert self.pool.num_available == len(self.free) - self.num_promised

    @invariant()
    def states_and_generations_are_right(self) -> None:
        for page in range(NUM_PAGES):
            assert self.pool.state(page) is self._state(page)
            assert self.pool.generation(page) == self.freed[page]

    def _own(self, pages: tuple[int, ...], num_pages: int) -> object:
        assert len(set(pages)) == num_pages
        assert all(page in self.free for page in pages)
        self.owners.update(pages)
        return multiple(*pages)

    def _count_if_freed(self, page: int) -> None:
        if page in self.free:
            self.freed[page] += 1

    def _state(self, page: int) -> PageState:
        if self.pins[page]:
            return PageState.PINNED if self.owners[page] else PageState.QUARANTINED
        return PageState.OWNED if self.owners[page] else PageState.FREE


PoolMachine.TestCase.settings = settings(max_examples=150, deadline=None)
TestPagePool = PoolMachine.TestCase


def test_a_pool_has_pages() -> None:
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)


def test_a_page_that_lost_its_owner_under_an_operation_is_not_allocated() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.pin(pages)
    pool.release(pages)
    assert pool.state(pages[0]) is PageState.QUARANTINED
    with pytest.raises(OutOfPages, match="1 pages were asked for; 0 of 1"):
        pool.allocate(1)
    pool.unpin(pages)
    assert pool.allocate(1) == pages


def test_an_allocation_that_fails_takes_nothing() -> None:
    pool = PagePool(4)
    reservation = pool.reserve(3)
    with pytest.raises(OutOfPages):
        pool.allocate(2)
    assert pool.num_available == 1
    assert len(pool.take(reservation, 3)) == 3


def test_lost_books_are_noticed() -> None:
    pool = PagePool(3)
    pool.reserve(3).num_pages = 0
    pool._promised = 4
    with pytest.raises(IntegrityError, match="4 pages are promised, 3 are free or cached"):
        pool.check_integrity()
