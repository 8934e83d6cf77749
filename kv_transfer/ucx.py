"""Messages over UCX: shared memory on one machine, RDMA or TCP between machines.

A TCP connection beside UCX carries headers and says when the peer is gone. A payload is announced
there, gets its place, and only then travels over UCX: so UCX never has to store it in between, and
one that is not wanted is not sent.
"""

import asyncio
import contextlib
import socket
import time
from collections import deque
from dataclasses import dataclass

from pagewire.kv_transfer.framing import PREFIX_BYTES, FramingError, Kind, Prefix
from pagewire.kv_transfer.handshake import Hello
from pagewire.kv_transfer.peers import CLOSED_HERE, place
from pagewire.kv_transfer.socket_io import PEER_CLOSED, why_ended
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.transport import ConnectionLost, Handler, TransferStats, TransportError
from pagewire.kv_transfer.ucx_library import UcxLibrary, open_library
from pagewire.kv_transfer.ucx_link import UcxLink, fail

_MAX_ARRIVALS = 1024  # messages behind a payload under way; then headers wait in the socket


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outgoing:
    """A payload that was announced."""

    payload: memoryview
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    """A message that is complete once `done` is; delivered in the order of the announcements."""

    header: bytes
    num_bytes: int = 0
    done: asyncio.Future[None] | None = None  # None: it has no payload
    started: float = 0.0


class UcxConnection:
    """One peer's TCP connection for headers and UCX link for payloads."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        link: UcxLink,
        *,
        peer: bytes,
        handler: Handler,
        stats: TransferStats,
    ) -> None:
        self.closed_here = False
        self._reader = reader
        self._writer = writer
        self._link = link
        self._peer = peer
        self._handler = handler
        self._stats = stats
        self._ended = False
        self._unanswered: deque[_Outgoing] = deque()
        self._arrivals: asyncio.Queue[_Arrival] = asyncio.Queue(_MAX_ARRIVALS)
        self._num_sent = 0  # payloads; both ends number them alike
        self._num_received = 0

    @property
    def peer(self) -> bytes:
        return self._peer

    async def send(self, header: bytes, *payload: memoryview) -> None:
        num_bytes = sum(part.nbytes for part in payload)
        kind = Kind.ANNOUNCE if num_bytes else Kind.MESSAGE
        prefix = Prefix(kind=kind, header_bytes=len(header), payload_bytes=num_bytes)
        if self._ended:
            raise ConnectionLost("the connection has ended")
        started = time.perf_counter()
        try:
            self._write(prefix, header)
            if num_bytes:
                await self._send_payload(_gathered(payload))
            else:
                await self._writer.drain()
        except (OSError, ConnectionLost) as error:
            self._end()
            raise ConnectionLost(f"the peer cannot be reached: {error}") from error
        except asyncio.CancelledError:
            self.close()  # the peer may be waiting for a payload that will not come
            raise
        self._stats.send_seconds += time.perf_counter() - started
        self._stats.bytes_sent += num_bytes

    def close(self) -> None:
        if not self._ended:
            self.closed_here = True
            self._end()

    async def run(self) -> str:
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._deliver())]
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        reasons = [task.result() for task in done]
        return CLOSED_HERE if self.closed_here else reasons[0]

    async def release(self) -> None:
        self._end()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _end(self) -> None:
        """End both ways at once, and with them every send and receive. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._writer.transport.abort()
        self._link.close()
        while self._unanswered:
            fail(self._unanswered.popleft().done, "the connection has ended")

    def _write(self, prefix: Prefix, header: bytes = b"") -> None:
        if self._writer.is_closing():  # the reader will notice, too
            raise ConnectionResetError(PEER_CLOSED)
        self._writer.write(prefix.encode() + header)

    async def _send_payload(self, payload: memoryview) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unanswered.append(_Outgoing(payload=payload, done=done))
        await done

    async def _read(self) -> str:
        """Follow the peer's headers until the connection ends; returns the reason."""
        try:
            while not self._ended:
                prefix = Prefix.decode(await self._reader.readexactly(PREFIX_BYTES))
                header = await self._reader.readexactly(prefix.header_bytes)
                await self._on_prefix(prefix, header)
        except (OSError, EOFError, FramingError) as error:
            return why_ended(error)
        return "the connection has ended"

    async def _on_prefix(self, prefix: Prefix, header: bytes) -> None:
        match prefix.kind:
            case Kind.MESSAGE if prefix.payload_bytes == 0:
                await self._arrivals.put(_Arrival(header=header))
            case Kind.ANNOUNCE if prefix.payload_bytes > 0:
                await self._on_announce(header, prefix.payload_bytes)
            case Kind.READY:
                self._on_ready()
            case Kind.DISCARD:
                self._on_discard()
            case _:
                raise FramingError(f"{prefix.kind.name} of {prefix.payload_bytes} bytes")

    async def _deliver(self) -> str:
        """Deliver messages in order until a payload fails to arrive; returns the reason."""
        while True:
            arrival = await self._arrivals.get()
            if arrival.done is not None:
                try:
                    await arrival.done
                except ConnectionLost as error:
                    return str(error)
                self._stats.receive_seconds += time.perf_counter() - arrival.started
                self._stats.bytes_received += arrival.num_bytes
            self._handler.deliver(self._peer, arrival.header)

    async def _on_announce(self, header: bytes, num_bytes: int) -> None:
        started = time.perf_counter()
        target = place(self._handler, self._peer, header, num_bytes)
        if self._ended:  # closed by the callback
            return
        if target is None:
            self._write(Prefix(kind=Kind.DISCARD))
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._link.receive(target, self._num_received, done)
        self._num_received += 1
        self._write(Prefix(kind=Kind.READY))
        await self._arrivals.put(
            _Arrival(header=header, num_bytes=num_bytes, done=done, started=started)
        )

    def _on_ready(self) -> None:
        outgoing = self._oldest_unanswered()
        if not outgoing.done.done():  # else its sender gave up, and is about to close
            self._link.send(outgoing.payload, self._num_sent, outgoing.done)
            self._num_sent += 1

    def _on_discard(self) -> None:
        outgoing = self._oldest_unanswered()
        if not outgoing.done.done():
            outgoing.done.set_result(None)

    def _oldest_unanswered(self) -> _Outgoing:
        if not self._unanswered:
            raise FramingError("an answer to a payload that was not announced")
        return self._unanswered.popleft()


def _gathered(payload: tuple[memoryview, ...]) -> memoryview:
    """The parts of a payload in one piece, since a tagged send takes no more than one."""
    return payload[0].cast("B") if len(payload) == 1 else memoryview(b"".join(payload))


class _UcxOpening:
    """Holds the UCX worker of a connection that is being made."""

    def __init__(self, library: UcxLibrary, *, handler: Handler, stats: TransferStats) -> None:
        self._link = UcxLink(library)
        self._handler = handler
        self._stats = stats

    @property
    def note(self) -> bytes:
        return self._link.address

    async def finish(self, sock: socket.socket, hello: Hello) -> UcxConnection:
        await self._link.connect(hello.note)
        reader, writer = await asyncio.open_connection(sock=sock)
        return UcxConnection(
            reader,
            writer,
            self._link,
            peer=hello.sender,
            handler=self._handler,
            stats=self._stats,
        )

    def abandon(self) -> None:
        self._link.close()


class UcxTransport(SocketTransport[UcxConnection]):
    """Carries headers over TCP and payloads over UCX."""

    kind = "ucx"

    def __init__(self, *, incarnation: bytes, handler: Handler, host: str) -> None:
        super().__init__(incarnation=incarnation, handler=handler, host=host)
        self._library: UcxLibrary | None = None

    async def start(self) -> None:
        self._library = await asyncio.to_thread(open_library, self._host)
        await super().start()

    async def close(self) -> None:
        await super().close()
        self._library = None

    def _open(self) -> _UcxOpening:
        if self._library is None:
            raise TransportError("the ucx transport is not started")
        return _UcxOpening(self._library, handler=self._handler, stats=self.stats)
