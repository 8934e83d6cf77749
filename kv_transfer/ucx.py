"""Messages over UCX: shared memory on one machine, RDMA or TCP between machines.

A TCP connection beside UCX carries headers, and each payload is announced there.
"""

import asyncio
import socket

from pagewire.kv_transfer.announced import AnnouncedConnection
from pagewire.kv_transfer.handshake import Hello
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.transport import Handler, TransferStats, TransportError
from pagewire.kv_transfer.ucx_library import UcxLibrary, open_library
from pagewire.kv_transfer.ucx_link import UcxLink


class _UcxOpening:
    """Holds the UCX worker of a connection that is being made."""

    def __init__(self, library: UcxLibrary, *, handler: Handler, stats: TransferStats) -> None:
        self._link = UcxLink(library)
        self._handler = handler
        self._stats = stats

    @property
    def note(self) -> bytes:
        return self._link.address

    async def finish(self, sock: socket.socket, hello: Hello) -> AnnouncedConnection:
        await self._link.connect(hello.note)
        reader, writer = await asyncio.open_connection(sock=sock)
        return AnnouncedConnection(
            reader,
            writer,
            self._link,
            peer=hello.sender,
            handler=self._handler,
            stats=self._stats,
        )

    def abandon(self) -> None:
        self._link.close()


class UcxTransport(SocketTransport[AnnouncedConnection]):
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
