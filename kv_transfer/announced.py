"""Messages whose headers travel over TCP, and whose payloads move beside them.

A payload is announced on the TCP connection, gets its place, and only then moves: so the way that
it takes never has to store it in between, and one that is not wanted is not sent. The TCP
connection also keeps the order, and its end says that the peer is gone.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pagewire.kv_transfer.device_memory import DeviceLanding, DeviceMemory, DeviceSender
from pagewire.kv_transfer.framing import PREFIX_BYTES, Decoder, Encoder, FramingError, Kind, Prefix
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.peers import CLOSED_HERE, place
from pagewire.kv_transfer.socket_io import PEER_CLOSED, why_ended
from pagewire.kv_transfer.transport import ConnectionLost, Handler, TransferStats

_MAX_ARRIVALS = 1024  # messages behind a payload under way; then headers wait in the socket


class PayloadLink(Protocol):
    """The way of payloads. Both ends see the same transfers in the same order."""

    def send(self, payload: memoryview, done: asyncio.Future[None]) -> None:
        """Send `payload` to the receive of the same place in the order at the peer.

        `done` ends when its memory may be reused, with ConnectionLost when it did not arrive.
        """

    def receive(self, target: memoryview, done: asyncio.Future[None]) -> None:
        """Fill `target` with what the peer sends; `done` ends as that of `send`."""

    def close(self) -> None:
        """End every transfer at once: no buffer is touched any more when this returns.

        May be called again.
        """

    async def wait_closed(self) -> None:
        """Free what is left after `close`."""


class DeviceLink(Protocol):
    """The same way for payloads in the memory of GPUs, in one order with those of the host."""

    def send(self, payload: DeviceMemory, done: asyncio.Future[None]) -> None:
        """As that of PayloadLink."""

    def receive(self, target: DeviceMemory, done: asyncio.Future[None]) -> None:
        """As that of PayloadLink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outgoing:
    """A payload that was announced."""

    begin: Callable[[asyncio.Future[None]], None]  # once the peer is ready
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    """A message, complete once its payload is; delivered in the order of the announcements."""

    header: bytes
    payload: "_Incoming | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Incoming:
    """A payload under way to its place."""

    landing: Landing
    staged: memoryview | None  # in one part, where the landing has several
    done: asyncio.Future[None]
    started: float

    def settle(self) -> None:
        """The payload is complete: bring it to its place, unless it is there."""
        if self.staged is not None:
            self.landing.write(self.staged)


class AnnouncedConnection:
    """One peer's TCP connection for headers and link for payloads."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        link: PayloadLink,
        *,
        peer: bytes,
        handler: Handler,
        stats: TransferStats,
        device_link: DeviceLink | None = None,
    ) -> None:
        """`device_link`: of a pair with pages on GPUs at both ends, whose link moves those."""
        self.closed_here = False
        self._reader = reader
        self._writer = writer
        self._link = link
        self._device_link = device_link
        self._peer = peer
        self._handler = handler
        self._stats = stats
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._ended = False
        self._unanswered: deque[_Outgoing] = deque()
        self._arrivals: asyncio.Queue[_Arrival] = asyncio.Queue(_MAX_ARRIVALS)

    @property
    def peer(self) -> bytes:
        return self._peer

    @property
    def on_device(self) -> DeviceSender | None:
        return None if self._device_link is None else self

    async def send(self, header: bytes, *payload: memoryview) -> None:
        num_bytes = sum(part.nbytes for part in payload)
        async with self._sending(num_bytes):
            if num_bytes:
                self._write(Kind.ANNOUNCE, header, num_bytes)
                await self._send_payload(partial(self._link.send, _gathered(payload)))
            else:
                self._write(Kind.MESSAGE, header)
                await self._writer.drain()

    async def send_from_device(self, header: bytes, payload: DeviceMemory) -> None:
        assert self._device_link is not None, "the pair moves host memory; see on_device"
        async with self._sending(payload.nbytes):
            self._write(Kind.ANNOUNCE, header, payload.nbytes)
            await self._send_payload(partial(self._device_link.send, payload))

    @contextlib.asynccontextmanager
    async def _sending(self, num_bytes: int) -> AsyncIterator[None]:
        """Around the sending of a message with so many bytes of payload. Raises ConnectionLost."""
        if self._ended:
            raise ConnectionLost("the connection has ended")
        started = time.perf_counter()
        try:
            yield
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
        await self._link.wait_closed()
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

    def _write(self, kind: Kind, header: bytes = b"", payload_bytes: int = 0) -> None:
        if self._writer.is_closing():  # the reader will notice, too
            raise ConnectionResetError(PEER_CLOSED)
        self._writer.write(self._encoder.encode(kind, header, payload_bytes))

    async def _send_payload(self, begin: Callable[[asyncio.Future[None]], None]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unanswered.append(_Outgoing(begin=begin, done=done))
        await done

    async def _read(self) -> str:
        """Follow the peer's headers until the connection ends; returns the reason."""
        try:
            while not self._ended:
                prefix = self._decoder.decode(await self._reader.readexactly(PREFIX_BYTES))
                header = await self._reader.readexactly(prefix.header_bytes)
                prefix.require_sound(header)
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
            payload = arrival.payload
            if payload is not None:
                try:
                    await payload.done
                except ConnectionLost as error:
                    return str(error)
                payload.settle()
                self._stats.receive_seconds += time.perf_counter() - payload.started
                self._stats.bytes_received += payload.landing.num_bytes
            self._handler.deliver(self._peer, arrival.header)

    async def _on_announce(self, header: bytes, num_bytes: int) -> None:
        started = time.perf_counter()
        landing = place(self._handler, self._peer, header, num_bytes)
        if self._ended:  # closed by the callback
            return
        if landing is None:
            self._write(Kind.DISCARD)
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        staged = self._receive(landing, done)
        self._write(Kind.READY)
        payload = _Incoming(landing=landing, staged=staged, done=done, started=started)
        await self._arrivals.put(_Arrival(header=header, payload=payload))

    def _receive(self, landing: Landing, done: asyncio.Future[None]) -> memoryview | None:
        """Let a payload come. Returns where it does, unless it comes to its place itself."""
        if isinstance(landing, DeviceLanding):
            assert self._device_link is not None, "the pair moves host memory; see on_device"
            self._device_link.receive(landing.memory, done)
            return None
        if landing.whole is not None:
            self._link.receive(landing.whole, done)
            return None
        staged = memoryview(bytearray(landing.num_bytes))  # a link fills one part
        self._link.receive(staged, done)
        return staged

    def _on_ready(self) -> None:
        outgoing = self._oldest_unanswered()
        if not outgoing.done.done():  # else its sender gave up, and is about to close
            outgoing.begin(outgoing.done)

    def _on_discard(self) -> None:
        outgoing = self._oldest_unanswered()
        if not outgoing.done.done():
            outgoing.done.set_result(None)

    def _oldest_unanswered(self) -> _Outgoing:
        if not self._unanswered:
            raise FramingError("an answer to a payload that was not announced")
        return self._unanswered.popleft()


def _gathered(payload: tuple[memoryview, ...]) -> memoryview:
    """The parts of a payload in one piece, since a link takes no more than one."""
    return payload[0].cast("B") if len(payload) == 1 else memoryview(b"".join(payload))


def fail(done: asyncio.Future[None], reason: str) -> None:
    """End `done` with ConnectionLost, unless it has ended; whoever waits for it may be gone."""
    if not done.done():
        done.set_exception(ConnectionLost(reason))
        done.exception()  # asyncio shall not complain that nobody asked
