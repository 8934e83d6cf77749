"""The host memory through which frames leave a device: a fixed number of buffers."""

import asyncio
from collections import Counter, deque
from typing import NamedTuple


class _Waiter(NamedTuple):
    peer: bytes
    given: asyncio.Future[int]


class SendBuffers:
    """Lends buffers by their number, in the order in which they are asked for.

    One peer holds half of them at most: frames for a peer that has stalled do not keep back those
    for others.
    """

    def __init__(self, num_buffers: int) -> None:
        """Raises ValueError when `num_buffers` is not positive."""
        if num_buffers < 1:
            raise ValueError(f"num_buffers is {num_buffers}; frames need at least 1 to leave")
        self._free = list(range(num_buffers))
        self._share = -(-num_buffers // 2)
        self._held: Counter[bytes] = Counter()  # by peer
        self._waiting: deque[_Waiter] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, peer: bytes) -> asyncio.Future[int]:
        """A buffer for a frame to `peer`, once there is one."""
        given: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiter(peer, given))
        self._lend()
        return given

    def give_back(self, peer: bytes, buffer: int) -> None:
        """What `peer` was to get from `buffer` has left it."""
        self._held[peer] -= 1
        if not self._held[peer]:
            del self._held[peer]
        self._free.append(buffer)
        self._lend()

    def _lend(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            if waiter.given.done():  # nobody waits any more
                continue
            if self._free and self._held[waiter.peer] < self._share:
                self._held[waiter.peer] += 1
                waiter.given.set_result(self._free.pop())
            else:
                self._waiting.append(waiter)
