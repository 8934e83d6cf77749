"""What a worker reports of its prefix cache, and what its routers make of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import KEY_BYTES, PageHasher
from pagewire.router.cached_pages import CachedPages
from pagewire.worker.cache_reports import CacheReports

HASHER = PageHasher(secret=bytes(KEY_BYTES), page_size=1)
ROUTERS = (b"first".ljust(16), b"second".ljust(16))


def hash_of(index: int) -> bytes:
    return bytes([index] * 16)


def delta(epoch: int, seq: int, stored: int = 0, removed: int = 0) -> pb.KvDelta:
    return pb.KvDelta(
        epoch=epoch,
        seq=seq,
        stored=[hash_of(stored)] if stored else [],
        removed=[hash_of(removed)] if removed else [],
    )


def test_hits_are_counted_from_the_first_page() -> None:
    pages = CachedPages()
    assert pages.apply(delta(1, 0, stored=1))
    assert pages.apply(delta(1, 1, stored=3))
    assert pages.num_leading([hash_of(index) for index in (1, 2, 3)]) == 1
    assert pages.apply(delta(1, 2, stored=2, removed=1))
    assert pages.num_leading([hash_of(index) for index in (2, 3)]) == 2
    assert pages.num_leading([hash_of(1)]) == 0


def test_a_gap_costs_everything_until_the_next_snapshot() -> None:
    pages = CachedPages()
    pages.apply(delta(1, 0, stored=1))
    assert not pages.apply(delta(1, 2, stored=2))
    assert not pages.apply(delta(1, 3, stored=2))
    assert pages.num_leading([hash_of(1)]) == 0
    assert pages.apply(delta(2, 0, stored=3))
    assert pages.num_leading([hash_of(3)]) == 1


@pytest.mark.parametrize("repeated", [delta(2, 0, stored=9), delta(1, 5), delta(2, 1, stored=9)])
def test_repeated_messages_change_nothing(repeated: pb.KvDelta) -> None:
    pages = CachedPages()
    pages.apply(delta(2, 0, stored=1))
    pages.apply(delta(2, 1, stored=2))
    assert pages.apply(repeated)
    assert pages.num_leading([hash_of(1), hash_of(2)]) == 2
    assert pages.num_leading([hash_of(9)]) == 0


@given(data=st.data())
def test_routers_that_come_go_and_miss_messages_end_up_with_the_truth(data: st.DataObject) -> None:
    pool = PagePool(6)
    cache = PrefixCache(pool)
    reports = CacheReports(cache, b"w" * 16)
    pictures = {router: CachedPages() for router in ROUTERS}

    def deliver(routers: list[bytes], *, is_lossy: bool) -> None:
        for effect in reports.report(routers):
            router = effect.event.route.receiver
            is_lost = is_lossy and data.draw(st.booleans())
            if not is_lost and not pictures[router].apply(effect.event.kv_delta):
                reports.forget(router)

    for _ in range(data.draw(st.integers(0, 12))):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))
        keys = HASHER.keys(prompt)
        allocated = cache.allocate(keys, len(keys))
        assert allocated is not None
        cache.register(keys, allocated.pages)
        pool.release(allocated.pages)
        deliver(data.draw(st.lists(st.sampled_from(ROUTERS), unique=True)), is_lossy=True)
    for router in ROUTERS:  # a new session
        reports.forget(router)
    deliver(list(ROUTERS), is_lossy=False)
    hashes = cache.hashes()
    for picture in pictures.values():
        assert all(picture.num_leading([each]) for each in hashes)
        assert len(picture._hashes) == len(hashes)
