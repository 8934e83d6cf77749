"""Messages between workers of one process, over the same seam as between machines.

For tests, and for a prefill and a decode worker in one process. A hub that its user creates joins
the transports; all of them run on one event loop.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from pagewire.kv_transfer.framing import Kind, Prefix
from pagewire.kv_transfer.peers import CLOSED_HERE, Peers, place
from pagewire.kv_transfer.socket_io import PEER_CLOSED
from pagewire.kv_transfer.transport import (
    ConnectionLost,
    Handler,
    TransferStats,
    TransportError,
)


class LocalHub:
    """The network of LocalTransports: finds one by its incarnation."""

    def __init__(self) -> None:
        self._transports: dict[bytes, LocalTransport] = {}

    def join(self, incarnation: bytes, transport: "LocalTransport") -> None:
        self._transports[incarnation] = transport

    def leave(self, incarnation: bytes) -> None:
        self._transports.pop(incarnation, None)

    def find(self, incarnation: bytes) -> "LocalTransport | None":
        return self._transports.get(incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """One message under way. `taken` is done when its payload has been copied or discarded."""

    header: bytes
    payload: tuple[memoryview, ...]
    num_bytes: int
    taken: asyncio.Future[None]


class LocalConnection:
    """One end of a pair. What one end sends, the other end's task copies and delivers."""

    on_device = None  # payloads are in host memory

    def __init__(self, *, peer: bytes, handler: Handler, stats: TransferStats) -> None:
        self.closed_here = False
        self._peer = peer
        self._handler = handler
        self._stats = stats
        self._other: LocalConnection | None = None
        self._ended = False
        self._inbox: deque[_Message] = deque()
        self._arrived = asyncio.Event()

    def join(self, other: "LocalConnection") -> None:
        """Make `other` the other end of this one."""
        self._other = other

    @property
    def peer(self) -> bytes:
        return self._peer

    async def send(self, header: bytes, *payload: memoryview) -> None:
        num_bytes = sum(part.nbytes for part in payload)
        Prefix(kind=Kind.MESSAGE, header_bytes=len(header), payload_bytes=num_bytes)
        if self._other is None or self._ended:
            raise ConnectionLost("the connection has ended")
        started = time.perf_counter()
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._other.accept(
            _Message(header=header, payload=payload, num_bytes=num_bytes, taken=taken)
        )
        await taken
        self._stats.send_seconds += time.perf_counter() - started
        self._stats.bytes_sent += num_bytes

    def accept(self, message: _Message) -> None:
        """Called by the other end: `message` arrives."""
        self._inbox.append(message)
        self._arrived.set()

    def close(self) -> None:
        if not self._ended:
            self.closed_here = True
            self.end()

    def end(self) -> None:
        """Stop both ends; each then fails what it has not taken yet."""
        if self._ended:
            return
        self._ended = True
        self._arrived.set()
        if self._other is not None:
            self._other.end()

    async def run(self) -> str:
        """Deliver messages until the connection ends, and return the reason."""
        while not self._ended:
            self._arrived.clear()
            while self._inbox and not self._ended:
                self._take(self._inbox[0])
                self._inbox.popleft()
            if not self._ended:
                await self._arrived.wait()
        return CLOSED_HERE if self.closed_here else PEER_CLOSED

    async def release(self) -> None:
        """Fail the sends that the other end still waits for."""
        self.end()
        for message in self._inbox:
            if not message.taken.done():
                message.taken.set_exception(ConnectionLost("the connection has ended"))
        self._inbox.clear()

    def _take(self, message: _Message) -> None:
        if message.taken.done():  # its sender was cancelled: the payload may be gone
            return
        if not message.num_bytes or self._copy(message):
            self._handler.deliver(self._peer, message.header)
        message.taken.set_result(None)

    def _copy(self, message: _Message) -> bool:
        """Whether the payload was wanted."""
        started = time.perf_counter()
        landing = place(self._handler, self._peer, message.header, message.num_bytes)
        if landing is None:
            return False
        for part in message.payload:
            landing.write(part.cast("B"))
        self._stats.receive_seconds += time.perf_counter() - started
        self._stats.bytes_received += message.num_bytes
        return True


class LocalTransport:
    """Carries messages to the other transports of one hub."""

    kind = "local"

    def __init__(self, *, hub: LocalHub, incarnation: bytes, handler: Handler) -> None:
        self.stats = TransferStats()
        self._hub = hub
        self._incarnation = incarnation
        self._handler = handler
        self._peers: Peers[LocalConnection] = Peers(handler=handler, stats=self.stats)

    @property
    def address(self) -> bytes:
        return self._incarnation

    async def start(self) -> None:
        self._hub.join(self._incarnation, self)

    def obstacle(self, address: bytes) -> str | None:
        return None

    async def connect(self, peer: bytes, address: bytes) -> LocalConnection:
        existing = self._peers.get(peer)
        if existing is not None:
            return existing
        if address != peer:
            raise TransportError(f"incarnation {address.hex()} answers instead of {peer.hex()}")
        target = self._hub.find(address)
        if target is None:
            raise TransportError(f"no worker of incarnation {peer.hex()} is in this process")
        mine = self._open(peer)
        theirs = target._open(self._incarnation)
        mine.join(theirs)
        theirs.join(mine)
        self._peers.serve(mine)
        target._peers.serve(theirs)
        return mine

    def connection(self, peer: bytes) -> LocalConnection | None:
        return self._peers.get(peer)

    async def close(self) -> None:
        self._hub.leave(self._incarnation)
        await self._peers.close()

    def _open(self, peer: bytes) -> LocalConnection:
        return LocalConnection(peer=peer, handler=self._handler, stats=self.stats)
