"""Messages over TCP, with TLS if it is wanted: the fallback of every other transport.

Payloads go from the sender's memory and into the receiver's place without a copy in user space.
"""

import asyncio
import contextlib
import socket
import time
from dataclasses import dataclass

from pagewire.kv_transfer.framing import PREFIX_BYTES, Decoder, Encoder, FramingError, Kind
from pagewire.kv_transfer.handshake import Hello
from pagewire.kv_transfer.peers import CLOSED_HERE, place
from pagewire.kv_transfer.socket_io import receive, receive_into, receive_to, send, why_ended
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.tls import Tls
from pagewire.kv_transfer.transport import (
    ConnectionLost,
    Handler,
    TransferStats,
    TransportError,
)

_TLS = b"/tls"  # behind an address that takes nothing else
_DISCARD_BYTES = 64 * 1024


class TcpConnection:
    """One socket to a peer; a frame is read straight to where the Handler wants it to land."""

    on_device = None  # payloads are in host memory

    def __init__(
        self, sock: socket.socket, *, peer: bytes, handler: Handler, stats: TransferStats
    ) -> None:
        self.closed_here = False
        self._sock = sock
        self._peer = peer
        self._handler = handler
        self._stats = stats
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._ended = False
        self._sending = asyncio.Lock()  # first come, first served: it keeps the order of the calls

    @property
    def peer(self) -> bytes:
        return self._peer

    async def send(self, header: bytes, *payload: memoryview) -> None:
        parts = [part.cast("B") for part in payload]
        num_bytes = sum(map(len, parts))
        async with self._sending:
            if self._ended:
                raise ConnectionLost("the connection has ended")
            framed = self._encoder.encode(Kind.MESSAGE, header, num_bytes)
            started = time.perf_counter()
            try:
                await send(self._sock, framed, *parts)
            except OSError as error:
                self._shut_down()
                raise ConnectionLost(f"the peer cannot be reached: {error}") from error
            except asyncio.CancelledError:
                self.close()  # half a message may be on its way: nothing can follow it
                raise
            self._stats.send_seconds += time.perf_counter() - started
            self._stats.bytes_sent += num_bytes

    def close(self) -> None:
        if not self._ended:
            self.closed_here = True
            self._shut_down()

    async def run(self) -> str:
        try:
            while True:
                await self._receive_message()
                await asyncio.sleep(0)  # while bytes are there, receiving never waits by itself
        except (OSError, FramingError) as error:
            return CLOSED_HERE if self.closed_here else why_ended(error)

    async def release(self) -> None:
        self._shut_down()
        async with self._sending:  # a send that still holds the socket has been woken up
            self._sock.close()

    def _shut_down(self) -> None:
        """Wake up whatever waits for the socket, here and at the peer."""
        self._ended = True
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)

    async def _receive_message(self) -> None:
        prefix = self._decoder.decode(await receive(self._sock, PREFIX_BYTES))
        if prefix.kind is not Kind.MESSAGE:
            raise FramingError(f"a message of kind {prefix.kind.name} on a tcp connection")
        header = await receive(self._sock, prefix.header_bytes)
        prefix.require_sound(header)
        if prefix.payload_bytes and not await self._receive_payload(header, prefix.payload_bytes):
            return
        self._handler.deliver(self._peer, header)

    async def _receive_payload(self, header: bytes, num_bytes: int) -> bool:
        """Whether the payload was wanted."""
        started = time.perf_counter()
        landing = place(self._handler, self._peer, header, num_bytes)
        if landing is None:
            await self._discard(num_bytes)
            return False
        await receive_to(self._sock, landing)
        self._stats.receive_seconds += time.perf_counter() - started
        self._stats.bytes_received += num_bytes
        return True

    async def _discard(self, num_bytes: int) -> None:
        scratch = memoryview(bytearray(min(num_bytes, _DISCARD_BYTES)))
        while num_bytes > 0:
            part = scratch[:num_bytes]
            await receive_into(self._sock, part)
            num_bytes -= len(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TcpOpening:
    """A TCP connection needs nothing but its socket."""

    handler: Handler
    stats: TransferStats
    note: bytes = b""

    async def finish(self, sock: socket.socket, hello: Hello) -> TcpConnection:
        return TcpConnection(sock, peer=hello.sender, handler=self.handler, stats=self.stats)

    def abandon(self) -> None:
        """Nothing to free: the socket is the transport's until `finish`."""


class TcpTransport(SocketTransport[TcpConnection]):
    """Carries messages over one TCP connection per peer; with `tls` nobody else can read them."""

    kind = "tcp"

    def __init__(
        self, *, incarnation: bytes, handler: Handler, host: str, tls: Tls | None = None
    ) -> None:
        super().__init__(incarnation=incarnation, handler=handler, host=host)
        self._tls = tls

    @property
    def address(self) -> bytes:
        return super().address + (_TLS if self._tls else b"")

    def obstacle(self, address: bytes) -> str | None:
        if address.endswith(_TLS) == (self._tls is not None):
            return None
        without = "this worker" if self._tls is None else "the peer"
        return f"{without} has no TLS, which the other demands; give both kv_tls_cert"

    async def connect(self, peer: bytes, address: bytes) -> TcpConnection:
        obstacle = self.obstacle(address)
        if obstacle is not None:
            raise TransportError(f"no tcp connection to {peer.hex()}: {obstacle}")
        return await super().connect(peer, address.removesuffix(_TLS))

    async def _secure(self, sock: socket.socket, *, is_server: bool) -> socket.socket:
        if self._tls is None:
            return sock
        return await self._tls.secure(sock, is_server=is_server)

    def _open(self) -> _TcpOpening:
        return _TcpOpening(handler=self._handler, stats=self.stats)
