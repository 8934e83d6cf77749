"""One pair's way through a process group of torch.distributed, whichever library is behind it.

Its calls block, and none can be taken back: so there is a thread for each direction, and whatever
ends one transfer ends the link.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from pagewire.kv_transfer.announced import fail
from pagewire.kv_transfer.socket_io import PEER_CLOSED

# A dead peer is noticed at once, a machine that vanished after ten seconds, both by the connection
# for headers. This is for what neither notices.
PAYLOAD_TIMEOUT = timedelta(seconds=60)

logger = logging.getLogger(__name__)


class PairGroup(Protocol):
    """A process group of this worker and one peer. `send` and `receive` have a thread each."""

    def send(self, payload: memoryview) -> None:
        """Send `payload` to the receive of the same number at the peer; returns when it is there.

        Raises RuntimeError, since torch has no narrower one.
        """

    def receive(self, target: memoryview) -> None:
        """Fill `target` with the next payload of the peer, which must have its size; as `send`."""

    def disconnect(self) -> None:
        """End every call at once: none touches its memory any more when this returns."""


class GroupLink:
    """Moves payloads to and from one peer, one at a time in each direction."""

    def __init__(self, group: PairGroup, name: str) -> None:
        """`name` is what the threads are called after."""
        self._group: PairGroup | None = group
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._sender = ThreadPoolExecutor(1, f"{name}-send")
        self._receiver = ThreadPoolExecutor(1, f"{name}-receive")
        self._under_way: set[asyncio.Future[None]] = set()
        self._is_closed = False

    def send(self, payload: memoryview, done: asyncio.Future[None]) -> None:
        """Send `payload` behind those before it."""
        assert self._group is not None, "the link was closed"
        self._start(self._sender, self._group.send, payload, done)

    def receive(self, target: memoryview, done: asyncio.Future[None]) -> None:
        """Receive into `target` the next payload of the peer, which must have its size."""
        assert self._group is not None, "the link was closed"
        self._start(self._receiver, self._group.receive, target, done)

    def close(self) -> None:
        """End every transfer at once: no buffer is touched any more when this returns."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._group is not None:
            self._group.disconnect()
        for thread in (self._sender, self._receiver):
            thread.shutdown(wait=False, cancel_futures=True)
        for done in self._under_way:
            fail(done, "the connection has ended")

    async def wait_closed(self) -> None:
        """Let the threads and the group end."""
        for thread in (self._sender, self._receiver):
            await asyncio.to_thread(thread.shutdown)
        self._group = None

    def _start(
        self,
        thread: ThreadPoolExecutor,
        move: Callable[[memoryview], None],
        memory: memoryview,
        done: asyncio.Future[None],
    ) -> None:
        self._under_way.add(done)
        done.add_done_callback(self._under_way.discard)
        thread.submit(self._run, move, memory, done)

    def _run(
        self, move: Callable[[memoryview], None], memory: memoryview, done: asyncio.Future[None]
    ) -> None:
        started = time.monotonic()
        reason = None
        try:
            move(memory)
        except RuntimeError as error:
            logger.info("%s: %s", self._name, error)
            stalled = time.monotonic() - started >= PAYLOAD_TIMEOUT.total_seconds()
            reason = "a payload did not move for a minute" if stalled else PEER_CLOSED
        self._loop.call_soon_threadsafe(_settle, done, reason)


def as_tensor(memory: memoryview) -> Tensor:
    """[num_bytes]. The same memory, unless it is read-only, which torch takes none of."""
    return torch.frombuffer(bytearray(memory) if memory.readonly else memory, dtype=torch.uint8)


def _settle(done: asyncio.Future[None], reason: str | None) -> None:
    if reason is not None:
        fail(done, reason)
    elif not done.done():
        done.set_result(None)
