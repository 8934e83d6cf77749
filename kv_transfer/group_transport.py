"""Messages over torch.distributed: a process group for each pair of workers, static until it ends.

A TCP connection beside the group carries headers, and each payload is announced there. A group
cannot take one operation back, so whatever ends one transfer ends the connection.
"""

import asyncio
import contextlib
import socket
from abc import abstractmethod
from typing import Protocol

from pagewire.kv_transfer.announced import AnnouncedConnection, PayloadLink
from pagewire.kv_transfer.handshake import HandshakeError, Hello
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.transport import Handler, TransferStats, TransportError


class GroupDevice(Protocol):
    """What makes the groups of one worker."""

    @property
    def version(self) -> bytes:
        """What both ends must have the same of."""

    async def link(self, sock: socket.socket, rank: int) -> PayloadLink:
        """The way of payloads to the process at the other end of `sock`, as rank 0 or 1 of two.

        Both ends call this. Raises TransportError, OSError.
        """


class _GroupOpening:
    """Both ends make their half of the group once they know each other."""

    def __init__(self, device: GroupDevice, *, handler: Handler, stats: TransferStats) -> None:
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


class GroupTransport(SocketTransport[AnnouncedConnection]):
    """Carries headers over TCP and payloads through a process group."""

    def __init__(self, *, incarnation: bytes, handler: Handler, host: str) -> None:
        super().__init__(incarnation=incarnation, handler=handler, host=host)
        self._device: GroupDevice | None = None

    @abstractmethod
    def _open_device(self) -> GroupDevice:
        """What makes the groups; called on a thread, since torch takes seconds to import.

        Raises TransportError.
        """

    async def start(self) -> None:
        self._device = await asyncio.to_thread(self._open_device)
        await super().start()

    async def close(self) -> None:
        await super().close()
        self._device = None

    def _open(self) -> _GroupOpening:
        if self._device is None:
            raise TransportError(f"the {self.kind} transport is not started")
        return _GroupOpening(self._device, handler=self._handler, stats=self.stats)
