"""Whom a decode worker has promised room, and who waits for it. Pure.

The sum of all promises never exceeds the pool. Room goes to the oldest request, by the time that
its router took it in, and nobody passes it who needs less. So do the places in which requests wait:
when all are taken, an older one takes that of the youngest, which is refused. Whoever is refused
comes back older than all that came meanwhile, so nobody is refused for ever.

A promise outlives the loss of the prefill worker for a time: the attempt that follows finds its
room, and the pages that had come, where they were.
"""

import math
from bisect import insort_right
from collections.abc import Iterator

from pagewire.decode_worker.request import DecodeRequest
from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.worker.identity import AttemptKey


class Admission:
    """Reserves pages for requests: the oldest first, but for those promised before."""

    def __init__(
        self,
        *,
        pool: PagePool,
        cache: PrefixCache,
        page_size: int,
        max_waiting: int,
        lease_s: float,
    ) -> None:
        """At least one request may wait: `max_waiting`. Raises ValueError.

        `lease_s` is how long a promise is held for another attempt.
        """
        if max_waiting < 1:
            raise ValueError(f"max_waiting is {max_waiting}; one must be able to wait for its turn")
        self._pool = pool
        self._cache = cache
        self._page_size = page_size
        self._max_waiting = max_waiting
        self._lease_s = lease_s
        self._waiting: list[DecodeRequest] = []  # opened, not reserved yet; the oldest first
        self._held: dict[AttemptKey, DecodeRequest] = {}  # promised, and no hand-off is under way

    @property
    def waiting(self) -> tuple[DecodeRequest, ...]:
        return tuple(self._waiting)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def wait(self, request: DecodeRequest, since: float) -> None:
        """The hand-off has begun of a request that came to its router at `since`, by this clock.

        Who takes a promise over stands before all others.
        """
        is_successor = self._held.pop(request.key, None) is not None
        request.waits_since = -math.inf if is_successor else since
        insort_right(self._waiting, request, key=lambda item: item.waits_since)

    def refused(self) -> DecodeRequest | None:
        """Who cannot even wait: the youngest, when there are more than may."""
        if len(self._waiting) <= self._max_waiting:
            return None
        youngest = self._waiting[-1]
        return None if youngest.waits_since == -math.inf else youngest

    def admit(self) -> Iterator[tuple[DecodeRequest, int]]:
        """Reserve for those who wait, while there is room; with the sender's pages that are here.

        Pages of the prompt that are cached here need no room, and are not sent. Of smaller pages
        than the sender's so many are used that they make whole ones of it: frames are whole pages,
        and must not write into one that is shared.
        """
        while self._waiting:
            request = self._waiting[0]
            self.give_back(request)  # a promise that it took over; nobody comes in between
            num_pages = request.demand.num_pages(self._page_size)
            unit = request.receiver.hit_unit
            reserved = self._cache.reserve(request.page_keys, num_pages, unit=unit)
            if reserved is None:
                return
            del self._waiting[0]
            request.pages = list(reserved.hits)
            request.reservation = reserved.reservation
            yield request, request.receiver.on_reserved(len(reserved.hits))

    def leave(self, request: DecodeRequest) -> None:
        """It does not wait any more, and what it was promised is not held. It still has that."""
        self._held.pop(request.key, None)
        if request in self._waiting:
            self._waiting.remove(request)

    def give_back(self, request: DecodeRequest) -> None:
        """Release the pages of a request and what is left of its promise. Idempotent."""
        self._pool.release(request.pages)
        request.pages = []
        if request.reservation is not None:
            self._pool.cancel(request.reservation)
            request.reservation = None

    # --- Promises that outlive a hand-off ---------------------------------------------------------

    def hold(self, request: DecodeRequest, now: float) -> None:
        """Keep what a request was promised, though no hand-off of it is under way."""
        if request.reservation is not None:
            request.held_until = now + self._lease_s
            self._held[request.key] = request

    def held(self, key: AttemptKey) -> DecodeRequest | None:
        """The request whose promise is held under `key`."""
        return self._held.get(key)

    def held_for(self, router: bytes) -> list[DecodeRequest]:
        """Those that the requests of one router have."""
        return [request for request in self._held.values() if request.route.sender == router]

    def take_over(self, request: DecodeRequest, predecessor: DecodeRequest, now: float) -> None:
        """A new attempt gets what the one before it was promised, held until it begins."""
        self._held.pop(predecessor.key, None)
        request.pages, predecessor.pages = predecessor.pages, []
        request.reservation, predecessor.reservation = predecessor.reservation, None
        self.hold(request, now)

    def expire(self, now: float) -> None:
        """Give back what was held for too long: a later attempt has to wait like all others."""
        for request in [item for item in self._held.values() if now > (item.held_until or now)]:
            del self._held[request.key]
            self.give_back(request)

    def forgive(self, seconds: float, now: float) -> None:
        """This process stood still for so long: no lease ran meanwhile."""
        for request in self._held.values():
            if request.held_until is not None:
                request.held_until = min(request.held_until + seconds, now + self._lease_s)
