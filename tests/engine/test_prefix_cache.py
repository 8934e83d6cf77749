"""PrefixCache with a PagePool: against a simple model, and how it chooses what to evict."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from pagewire.engine.page_pool import OutOfPages, PagePool, PageState, Reservation
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.proto.page_hash import KEY_BYTES, PageHasher, PageKey

NUM_PAGES = 8
HASHER = PageHasher(secret=bytes(KEY_BYTES), page_size=2)

Held = tuple[tuple[int, ...], tuple[int, ...]]  # token ids, pages


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, compute, share and go. The model knows the content of every page."""

    sequences = Bundle("sequences")
    reservations = Bundle("reservations")
    pinned = Bundle("pinned")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.cache = PrefixCache(self.pool)
        self.owners: Counter[int] = Counter()
        self.pins: Counter[int] = Counter()
        self.contents: dict[int, PageKey] = {}  # of pages that were computed
        self.known: set[bytes] = set()  # what a router that follows the changes believes

    # Two tokens, so that prefixes are shared all the time.
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple)

    @rule(target=sequences, prompt=prompts)
    def allocate(self, prompt: tuple[int, ...]) -> object:
        keys = HASHER.keys(prompt)
        num_pages = -(-len(prompt) // 2)
        cached = self.cache.lookup(keys)
        room = self.pool.num_available - self.pool.num_idle(cached)
        allocated = self.cache.allocate(keys, num_pages)
        assert (allocated is None) == (num_pages - len(cached) > room)
        if allocated is None:
            return multiple()
        pages, num_hits = allocated
        assert pages[:num_hits] == cached
        assert [self.contents[page] for page in cached] == list(keys[:num_hits])
        for page in pages[num_hits:]:
            assert not self.owners[page] and not self.pins[page]
            self.contents.pop(page, None)
        self.owners.update(pages)
        return prompt, pages

    @rule(target=reservations, prompt=prompts, unit=st.sampled_from([1, 2, 4]))
    def reserve(self, prompt: tuple[int, ...], unit: int) -> object:
        cached = self.cache.lookup(HASHER.keys(prompt))
        reserved = self.cache.reserve(HASHER.keys(prompt), -(-len(prompt) // 2), unit=unit)
        if reserved is None:
            return multiple()
        hits, reservation = reserved
        assert hits == cached[: len(cached) - len(cached) % unit]
        self.owners.update(hits)
        return prompt, hits, reservation

    @rule(target=sequences, item=consumes(reservations))
    def take(self, item: tuple[tuple[int, ...], tuple[int, ...], Reservation]) -> Held:
        prompt, hits, reservation = item
        pages = self.pool.take(reservation, reservation.num_pages)
        for page in pages:
            assert not self.owners[page] and not self.pins[page]
            self.contents.pop(page, None)
        self.owners.update(pages)
        return prompt, hits + pages

    @rule(item=consumes(reservations))
    def cancel(self, item: tuple[tuple[int, ...], tuple[int, ...], Reservation]) -> None:
        _, hits, reservation = item
        self.pool.cancel(reservation)
        self.release_pages(hits)

    @rule(held=sequences)
    def compute(self, held: Held) -> None:
        prompt, pages = held
        keys = HASHER.keys(prompt)
        for key, page in zip(keys, pages, strict=False):
            assert self.contents.setdefault(page, key) == key, "a shared page was written"
        self.cache.register(keys, pages[: len(keys)])

    @rule(target=pinned, held=sequences)
    def pin(self, held: Held) -> tuple[int, ...]:
        self.pool.pin(held[1])
        self.pins.update(held[1])
        return held[1]

    @rule(pages=consumes(pinned))
    def unpin(self, pages: tuple[int, ...]) -> None:
        self.pool.unpin(pages)
        self.pins.subtract(pages)

    @rule(held=consumes(sequences))
    def release(self, held: Held) -> None:
        self.release_pages(held[1])

    @rule()
    def report(self) -> None:
        stored, removed = self.cache.take_changes()
        assert not self.known & set(stored)
        assert self.known >= set(removed)
        self.known = (self.known | set(stored)) - set(removed)
        assert self.known == set(self.cache.hashes())

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        self.cache.check_integrity()
        for page in range(NUM_PAGES):
            used = self.owners[page], self.pins[page]
            state = self.pool.state(page)
            assert (state in (PageState.FREE, PageState.CACHED)) == (used == (0, 0))
            assert (state in (PageState.OWNED, PageState.PINNED)) == (used[0] > 0)

    def release_pages(self, pages: tuple[int, ...]) -> None:
        self.pool.release(pages)
        self.owners.subtract(pages)


CacheMachine.TestCase.settings = settings(max_examples=120, deadline=None)
TestPrefixCache = CacheMachine.TestCase


def store(cache: PrefixCache, pool: PagePool, prompt: list[int]) -> tuple[int, ...]:
    """Compute a prompt of full pages and let go of it; returns its pages."""
    keys = HASHER.keys(prompt)
    allocated = cache.allocate(keys, len(keys))
    assert allocated is not None
    cache.register(keys, allocated.pages)
    pool.release(allocated.pages)
    return allocated.pages


def num_hits(cache: PrefixCache, prompt: list[int]) -> int:
    return len(cache.lookup(HASHER.keys(prompt)))


def test_the_longest_cached_prefix_is_found() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool)
    pages = store(cache, pool, [1, 2, 3, 4, 5, 6])
    assert cache.lookup(HASHER.keys([1, 2, 3, 4, 9, 9])) == pages[:2]
    assert cache.lookup(HASHER.keys([1, 2, 3])) == pages[:1]
    assert cache.lookup(HASHER.keys([2, 2, 3, 4])) == ()
    assert cache.lookup(HASHER.keys([1, 2, 3, 4], "salt")) == ()


def test_the_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    pool = PagePool(6)
    cache = PrefixCache(pool)
    first, second = [1, 1, 1, 2, 1, 3], [2, 1, 2, 2, 2, 3]
    store(cache, pool, first)
    store(cache, pool, second)
    pages = store(cache, pool, first)  # used again
    assert pool.counts().cached == 6
    pool.allocate(2)
    assert (num_hits(cache, first), num_hits(cache, second)) == (3, 1)
    pool.allocate(2)
    assert cache.lookup(HASHER.keys(first)) == pages[:2]
    assert num_hits(cache, second) == 0


def test_a_page_that_costs_more_to_compute_is_kept_longer() -> None:
    """Depth 128 of a pool this size weighs as much as two turnovers of age."""
    pool = PagePool(140)
    cache = PrefixCache(pool)
    long = [7] * (2 * 130)
    store(cache, pool, long)
    for token in range(10):
        store(cache, pool, [1, token])
    pool.allocate(5)
    assert num_hits(cache, long) == 130
    assert [num_hits(cache, [1, token]) for token in range(10)] == [0] * 5 + [1] * 5


def test_what_is_used_is_not_evicted() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    store(cache, pool, [1, 1, 1, 2])
    held = cache.allocate(HASHER.keys([1, 1]), 1)
    assert held is not None and held.num_hits == 1
    assert pool.num_available == 3
    assert not set(pool.allocate(3)) & set(held.pages)
    assert num_hits(cache, [1, 1, 1, 2]) == 1
    with pytest.raises(OutOfPages):
        pool.allocate(1)


def test_what_lies_before_a_page_in_use_can_be_freed() -> None:
    """Two sequences computed the same prefix at once; the later one's own pages follow it."""
    pool = PagePool(4)
    cache = PrefixCache(pool)
    short, long = HASHER.keys([1, 1]), HASHER.keys([1, 1, 1, 2])
    first, second = pool.allocate(1), pool.allocate(2)
    cache.register(short, first)
    cache.register(long, second)
    assert cache.lookup(long) == (first[0], second[1])  # no prefix twice
    pool.release(first)
    assert pool.num_available == 2
    pool.allocate(2)  # the copy of the first page among them
    assert len(cache) == 0
    cache.check_integrity()
    pool.release(second)
    assert pool.num_available == 2


def test_a_colliding_hash_never_serves_other_tokens() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    (key,) = HASHER.keys([1, 2])
    collision = key._replace(content=b"other tokens")
    pages = pool.allocate(2)
    cache.register([key], pages[:1])
    assert cache.lookup([collision]) == ()
    cache.register([collision], pages[1:])
    assert cache.lookup([key]) == pages[:1]
    cache.check_integrity()


def test_what_came_and_went_is_not_reported() -> None:
    pool = PagePool(1)
    cache = PrefixCache(pool)
    store(cache, pool, [1, 1])
    pool.release(pool.allocate(1))
    assert cache.take_changes() == ((), ())


def test_hits_that_are_promised_to_others_are_not_given_away() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool)
    store(cache, pool, [1, 1])
    pool.reserve(2)
    assert cache.allocate(HASHER.keys([1, 1]), 1) is None
    with pytest.raises(OutOfPages):
        pool.retain(cache.lookup(HASHER.keys([1, 1])))


def test_many_hits_leave_no_trace() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    for _ in range(100):
        store(cache, pool, [1, 1, 1, 2])
    assert len(cache._leaves) <= 2 * len(cache) + 1
