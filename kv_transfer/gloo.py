"""Messages over torch.distributed: a process group of two ranks for each pair of workers.

A TCP connection beside the group carries headers, and each payload is announced there. A group
cannot take one operation back, so whatever ends one transfer ends the connection.
"""

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

from pagewire.kv_transfer.announced import AnnouncedConnection
from pagewire.kv_transfer.handshake import HandshakeError, Hello
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.transport import Handler, TransferStats, TransportError

if TYPE_CHECKING:
    from pagewire.kv_transfer.gloo_device import GlooDevice


class _GlooOpening:
    """Both ends make their half of the group once they know each other."""

    def __init__(self, device: "GlooDevice", *, handler: Handler, stats: TransferStats) -> None:
        self._device = device
        self._handler = handler
        self._stats = stats

    @property
    def note(self) -> bytes:
        return self._device.version

    async def finish(self, sock: socket.socket, hello: Hello) -> AnnouncedConnection:
        if hello.note != self._device.version:
            raise HandshakeError(
                f"the peer has torch {hello.note.decode(errors='replace')}, this worker "
                f"{self._device.version.decode()}; install the same on both"
            )
        link = await self._device.link(sock, rank=int(hello.receiver > hello.sender))
        with contextlib.ExitStack() as undo:
            undo.callback(link.close)
            reader, writer = await asyncio.open_connection(sock=sock)
            undo.pop_all()
        return AnnouncedConnection(
            reader,
            writer,
            link,
            peer=hello.sender,
            handler=self._handler,
            stats=self._stats,
        )

    def abandon(self) -> None:
        """Nothing to free: `finish` leaves nothing behind when it fails."""


class GlooTransport(SocketTransport[AnnouncedConnection]):
    """Carries headers over TCP and payloads through a process group."""

    kind = "gloo"

    def __init__(self, *, incarnation: bytes, handler: Handler, host: str) -> None:
        super().__init__(incarnation=incarnation, handler=handler, host=host)
        self._device: GlooDevice | None = None

    async def start(self) -> None:
        self._device = await asyncio.to_thread(_open_device, self._host)
        await super().start()

    async def close(self) -> None:
        await super().close()
        self._device = None

    def _open(self) -> _GlooOpening:
        if self._device is None:
            raise TransportError("the gloo transport is not started")
        return _GlooOpening(self._device, handler=self._handler, stats=self.stats)


def _open_device(host: str) -> "GlooDevice":
    from pagewire.kv_transfer.gloo_device import GlooDevice  # torch takes seconds to import

    return GlooDevice(host)
