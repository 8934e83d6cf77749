"""The store through which the two ends of a process group find each other.

torch.distributed wants a key-value store that all ranks share, and brings a server for it. Two
ranks that are connected already need none: what one end sets is sent to the other. So no port is
open to strangers, and who speaks is settled before.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

from pagewire.kv_transfer.handshake import HandshakeError
from pagewire.kv_transfer.socket_io import receive, send
from pagewire.kv_transfer.transport import ConnectionLost

_LENGTHS = struct.Struct("!BH")  # of a key and of its value
_END = _LENGTHS.pack(0, 0)  # nothing more is set
_MAX_ENTRIES = 64
_TIMEOUT = timedelta(seconds=5)

T = TypeVar("T")


class PairStore(Store):
    """What both ends have set, so far. `set`, `get` and `wait` are torch's, on a thread of its own.

    They raise ConnectionLost for what is missing when the store is closed, as it is once the peer
    sets nothing more.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # it says str
        name = key.encode()
        entry = _LENGTHS.pack(len(name), len(value)) + name + value
        sending = asyncio.run_coroutine_threadsafe(send(self._sock, entry), self._loop)
        sending.result(_TIMEOUT.total_seconds())
        self._put(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta = _TIMEOUT) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._values.keys() >= set(keys),
                timeout.total_seconds(),
            )
            if not self._values.keys() >= set(keys):
                raise ConnectionLost(f"the peer did not set {', '.join(keys)}")

    def check(self, keys: list[str]) -> bool:
        """Whether all of `keys` are set."""
        with self._changed:
            return self._values.keys() >= set(keys)

    async def receive(self) -> None:
        """Take over what the peer sets, until it says that this was all.

        Raises OSError, and HandshakeError when it sets too much.
        """
        try:
            await self._receive_all()
        finally:
            self.close()  # what is missing now will not come

    async def finish(self) -> None:
        """Tell the peer that this end sets nothing more. Raises OSError."""
        await send(self._sock, _END)

    def close(self) -> None:
        """Wake up whoever waits for a value. May be called again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def _receive_all(self) -> None:
        for _ in range(_MAX_ENTRIES):
            key_bytes, value_bytes = _LENGTHS.unpack(await receive(self._sock, _LENGTHS.size))
            if key_bytes == 0:
                return
            key = await receive(self._sock, key_bytes)
            self._put(key.decode(errors="replace"), await receive(self._sock, value_bytes))
        raise HandshakeError(f"the peer set more than {_MAX_ENTRIES} keys of a process group")

    def _put(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()


async def join_group(sock: socket.socket, join: Callable[[PairStore], T]) -> T:
    """What `join` makes, on a thread, with the process at the other end of `sock`.

    Both ends call this; they share a store until both are done. Raises what `join` raises, and
    OSError.
    """
    store = PairStore(sock)
    receiving = asyncio.create_task(store.receive())
    try:
        joined = await asyncio.to_thread(join, store)
        await store.finish()
        await receiving
    finally:
        store.close()
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
    return joined
