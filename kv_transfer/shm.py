"""Messages between processes of one machine, payloads through shared memory.

A TCP connection carries headers and says when the peer is gone. A payload goes through a ring in
chunks: the sender copies one in, the receiver copies it out to its place and frees the slot, while
the sender fills the next. Both count the slots themselves and read nothing but payload from the
shared memory, so no peer can lead them astray.
"""

import asyncio
import contextlib
import hmac
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.framing import PREFIX_BYTES, Decoder, Encoder, FramingError, Kind, Prefix
from pagewire.kv_transfer.handshake import HandshakeError, Hello
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.peers import CLOSED_HERE, place
from pagewire.kv_transfer.shared_memory import (
    Offer,
    Segment,
    domain,
    open_offer,
    require_shared_memory,
)
from pagewire.kv_transfer.socket_io import PEER_CLOSED, receive, send, why_ended
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.transport import ConnectionLost, Handler, TransferStats, TransportError

NUM_SLOTS = 4
SLOT_BYTES = 4 << 20  # a whole frame, since each chunk wakes both ends up
RING_BYTES = NUM_SLOTS * SLOT_BYTES  # of one direction; what is never written takes no memory


@dataclass(slots=True, kw_only=True)
class _Arrival:
    """A payload of which some chunks have come."""

    header: bytes
    landing: Landing | None  # None: it is not wanted
    num_bytes: int
    num_copied: int = 0
    started: float


class ShmConnection:
    """One peer's TCP connection for headers and two rings for payloads."""

    on_device = None  # payloads are in host memory

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        outgoing: Segment,
        incoming: Segment,
        peer: bytes,
        handler: Handler,
        stats: TransferStats,
    ) -> None:
        self.closed_here = False
        self._reader = reader
        self._writer = writer
        self._outgoing = outgoing
        self._incoming = incoming
        self._peer = peer
        self._handler = handler
        self._stats = stats
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._ended = False
        self._sending = asyncio.Lock()  # first come, first served: it keeps the order of the calls
        self._freed = asyncio.Event()  # a slot, or for good because the connection has ended
        self._num_filled = 0  # slots, ever
        self._num_freed = 0
        self._num_emptied = 0
        self._arrival: _Arrival | None = None

    @property
    def peer(self) -> bytes:
        return self._peer

    async def send(self, header: bytes, *payload: memoryview) -> None:
        parts = [part.cast("B") for part in payload]
        num_bytes = sum(map(len, parts))
        # Refuses what is over a limit, before anything is sent.
        Prefix(kind=Kind.ANNOUNCE, header_bytes=len(header), payload_bytes=num_bytes)
        async with self._sending:
            if self._ended:
                raise ConnectionLost("the connection has ended")
            started = time.perf_counter()
            try:
                if num_bytes:
                    await self._send_payload(header, parts, num_bytes)
                else:
                    self._write(self._encoder.encode(Kind.MESSAGE, header))
                await self._writer.drain()
            except OSError as error:
                self._end()
                raise ConnectionLost(f"the peer cannot be reached: {error}") from error
            except asyncio.CancelledError:
                self.close()  # half a payload may be on its way: nothing can follow it
                raise
            self._stats.send_seconds += time.perf_counter() - started
            self._stats.bytes_sent += num_bytes

    def close(self) -> None:
        if not self._ended:
            self.closed_here = True
            self._end()

    async def run(self) -> str:
        try:
            while not self._ended:
                prefix = self._decoder.decode(await self._reader.readexactly(PREFIX_BYTES))
                header = await self._reader.readexactly(prefix.header_bytes)
                prefix.require_sound(header)
                await self._on_prefix(prefix, header)
        except (OSError, EOFError, FramingError) as error:
            reason = why_ended(error)
        else:
            reason = PEER_CLOSED  # a send noticed it first
        return CLOSED_HERE if self.closed_here else reason

    async def release(self) -> None:
        self._end()
        async with self._sending:  # a send that still fills a slot has been woken up
            self._outgoing.close()
        self._incoming.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _end(self) -> None:
        """End both ways at once, and wake up a send that waits for a slot. Idempotent."""
        self._ended = True
        self._freed.set()
        self._writer.transport.abort()

    def _write(self, *messages: bytes) -> None:
        if self._writer.is_closing():  # the reader will notice, too
            raise ConnectionResetError(PEER_CLOSED)
        self._writer.writelines(messages)

    async def _send_payload(
        self, header: bytes, parts: Sequence[memoryview], num_bytes: int
    ) -> None:
        rest = _Gather(parts)
        for start in range(0, num_bytes, SLOT_BYTES):
            length = min(num_bytes - start, SLOT_BYTES)
            rest.copy(self._outgoing.view, await self._free_slot(), length)
            self._num_filled += 1
            # The announcement goes with the first chunk, so that the peer is woken up once.
            announce = [] if start else [self._encoder.encode(Kind.ANNOUNCE, header, num_bytes)]
            self._write(*announce, self._encoder.encode(Kind.CHUNK, payload_bytes=length))
            await asyncio.sleep(0)  # while slots are free, nothing else here waits

    async def _free_slot(self) -> int:
        """The offset of the next slot, once the peer has emptied it. Raises ConnectionLost."""
        while not self._ended and self._num_filled - self._num_freed == NUM_SLOTS:
            self._freed.clear()
            await self._freed.wait()
        if self._ended:
            raise ConnectionLost("the connection has ended")
        return self._num_filled % NUM_SLOTS * SLOT_BYTES

    async def _on_prefix(self, prefix: Prefix, header: bytes) -> None:
        match prefix.kind:
            case Kind.MESSAGE if self._arrival is None and prefix.payload_bytes == 0:
                self._handler.deliver(self._peer, header)
            case Kind.ANNOUNCE if self._arrival is None and prefix.payload_bytes > 0:
                self._on_announce(header, prefix.payload_bytes)
            case Kind.CHUNK if self._arrival is not None and not header:
                self._on_chunk(self._arrival, prefix.payload_bytes)
                await asyncio.sleep(0)  # while chunks are there, reading never waits by itself
            case Kind.FREED if self._num_freed < self._num_filled and not header:
                self._num_freed += 1
                self._freed.set()
            case _:
                raise FramingError(f"{prefix.kind.name} of {prefix.payload_bytes} bytes, now")

    def _on_announce(self, header: bytes, num_bytes: int) -> None:
        self._arrival = _Arrival(
            header=header,
            landing=place(self._handler, self._peer, header, num_bytes),
            num_bytes=num_bytes,
            started=time.perf_counter(),
        )

    def _on_chunk(self, arrival: _Arrival, length: int) -> None:
        end = arrival.num_copied + length
        if not 0 < length <= SLOT_BYTES or end > arrival.num_bytes:
            raise FramingError(
                f"a chunk of {length} bytes, {arrival.num_copied} of {arrival.num_bytes} being here"
            )
        if arrival.landing is not None:
            offset = self._num_emptied % NUM_SLOTS * SLOT_BYTES
            arrival.landing.write(self._incoming.view[offset : offset + length])
        arrival.num_copied = end
        self._num_emptied += 1
        self._write(self._encoder.encode(Kind.FREED))
        if end == arrival.num_bytes:
            self._on_complete(arrival)

    def _on_complete(self, arrival: _Arrival) -> None:
        self._arrival = None
        if arrival.landing is not None:
            self._stats.receive_seconds += time.perf_counter() - arrival.started
            self._stats.bytes_received += arrival.num_bytes
            self._handler.deliver(self._peer, arrival.header)


class _Gather:
    """Copies the bytes of several buffers out, as if they were one."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = iter(parts)
        self._part = memoryview(b"")

    def copy(self, target: memoryview, offset: int, length: int) -> None:
        """Copy the next `length` bytes to `offset` of `target`."""
        while length > 0:
            if not self._part:
                self._part = next(self._parts)
            count = min(length, len(self._part))
            target[offset : offset + count] = self._part[:count]
            self._part = self._part[count:]
            offset += count
            length -= count


class _ShmOpening:
    """Offers the ring of a connection that is being made."""

    def __init__(self, *, handler: Handler, stats: TransferStats) -> None:
        self._offer = Offer(RING_BYTES)
        self._handler = handler
        self._stats = stats

    @property
    def note(self) -> bytes:
        return self._offer.note

    async def finish(self, sock: socket.socket, hello: Hello) -> ShmConnection:
        incoming = open_offer(hello.note, RING_BYTES)
        with contextlib.ExitStack() as undo:
            undo.callback(incoming.close)
            await self._prove(sock, incoming)
            reader, writer = await asyncio.open_connection(sock=sock)
            undo.pop_all()
        self._offer.withdraw()
        return ShmConnection(
            reader,
            writer,
            outgoing=self._offer.segment,
            incoming=incoming,
            peer=hello.sender,
            handler=self._handler,
            stats=self._stats,
        )

    def abandon(self) -> None:
        self._offer.close()

    async def _prove(self, sock: socket.socket, incoming: Segment) -> None:
        """Both ends show that they can read the other's ring. Raises HandshakeError, OSError."""
        expected = self._offer.segment.proof
        await send(sock, incoming.proof)
        if not hmac.compare_digest(await receive(sock, len(expected)), expected):
            raise HandshakeError("the peer has not opened the memory that it was offered")


class ShmTransport(SocketTransport[ShmConnection]):
    """Carries headers over TCP and payloads through shared memory."""

    kind = "shm"

    @property
    def address(self) -> bytes:
        return super().address + f"/{domain()}".encode()

    async def start(self) -> None:
        require_shared_memory()
        await super().start()

    def obstacle(self, address: bytes) -> str | None:
        if address.rpartition(b"/")[2] == domain().encode():
            return None
        return "it runs on another machine, in another container or as another user"

    async def connect(self, peer: bytes, address: bytes) -> ShmConnection:
        obstacle = self.obstacle(address)
        if obstacle is not None:
            raise TransportError(f"no memory to share with {peer.hex()}: {obstacle}")
        return await super().connect(peer, address.rpartition(b"/")[0])

    def _open(self) -> _ShmOpening:
        return _ShmOpening(handler=self._handler, stats=self.stats)
