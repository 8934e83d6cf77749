"""One pair's way through gloo: a process group of two ranks, and two threads that wait for it.

gloo wakes up whoever waits for an operation that its connection has not begun, but not who waits
for one that the end of the connection cuts in two. So nobody waits for a payload: behind it goes a
mark of one byte, and another comes back. Their receives are only begun once the payload is through.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pagewire.kv_transfer.announced import fail
from pagewire.kv_transfer.socket_io import PEER_CLOSED

# A dead peer is noticed at once, a machine that vanished after ten seconds, both by the connection
# for headers. This is for what neither notices.
_PAYLOAD_TIMEOUT = timedelta(seconds=60)
_AT_ONCE = timedelta(milliseconds=1)
# Tags of the operations; gloo keeps the order of those with the same.
_PAYLOAD, _MARK, _ANSWER, _NOTHING = range(4)

logger = logging.getLogger(__name__)


class GlooLink:
    """Moves payloads to and from one peer, one at a time in each direction."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._answer: Any = None  # the last that was sent
        self._peer = 1 - group.rank()
        self._loop = asyncio.get_running_loop()
        self._sender = ThreadPoolExecutor(1, "gloo-send")
        self._receiver = ThreadPoolExecutor(1, "gloo-receive")
        self._under_way: set[asyncio.Future[None]] = set()
        self._is_closed = False

    def send(self, payload: memoryview, done: asyncio.Future[None]) -> None:
        """Send `payload` behind those before it."""
        self._start(self._sender, self._send, payload, done)

    def receive(self, target: memoryview, done: asyncio.Future[None]) -> None:
        """Receive into `target` the next payload of the peer, which must have its size."""
        self._start(self._receiver, self._receive, target, done)

    def close(self) -> None:
        """End every transfer at once: no buffer is touched any more when this returns."""
        if self._is_closed:
            return
        self._is_closed = True
        self._disconnect()
        for thread in (self._sender, self._receiver):
            thread.shutdown(wait=False, cancel_futures=True)
        for done in self._under_way:
            fail(done, "the connection has ended")

    async def wait_closed(self) -> None:
        """Let the threads and the group end."""
        for thread in (self._sender, self._receiver):
            await asyncio.to_thread(thread.shutdown)
        self._answer = self._group = None

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
        except RuntimeError as error:  # torch has no narrower one
            logger.info("gloo: %s", error)
            stalled = time.monotonic() - started >= _PAYLOAD_TIMEOUT.total_seconds()
            reason = "a payload did not move for a minute" if stalled else PEER_CLOSED
        self._loop.call_soon_threadsafe(_settle, done, reason)

    def _send(self, payload: memoryview) -> None:
        sent = self._group.send([_as_tensor(payload)], self._peer, _PAYLOAD)
        marked = self._group.send([_byte()], self._peer, _MARK)
        self._group.recv([_byte()], self._peer, _ANSWER).wait(_PAYLOAD_TIMEOUT)
        sent.wait(_PAYLOAD_TIMEOUT)
        marked.wait(_PAYLOAD_TIMEOUT)

    def _receive(self, target: memoryview) -> None:
        received = self._group.recv([_as_tensor(target)], self._peer, _PAYLOAD)
        self._group.recv([_byte()], self._peer, _MARK).wait(_PAYLOAD_TIMEOUT)
        received.wait(_PAYLOAD_TIMEOUT)
        # Nobody waits for the answer. gloo needs it until it has arrived, which shows when the peer
        # sends its next payload.
        self._answer = self._group.send([_byte()], self._peer, _ANSWER)

    def _disconnect(self) -> None:
        """gloo has no call for it, but a time-out closes the connection, under all operations."""
        with contextlib.suppress(RuntimeError):  # the time-out; or it is closed already
            self._group.recv([_byte()], self._peer, _NOTHING).wait(_AT_ONCE)


def _settle(done: asyncio.Future[None], reason: str | None) -> None:
    if reason is not None:
        fail(done, reason)
    elif not done.done():
        done.set_result(None)


def _byte() -> Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def _as_tensor(memory: memoryview) -> Tensor:
    """[num_bytes]. The same memory, unless it is read-only, which torch takes none of."""
    return torch.frombuffer(bytearray(memory) if memory.readonly else memory, dtype=torch.uint8)
