"""What the transports over sockets have in common: listening, connecting, and the end of both.

A subclass says what a connection does once both ends know each other.
"""

import asyncio
import logging
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from pagewire.kv_transfer.handshake import (
    NOBODY,
    HandshakeError,
    Hello,
    receive_hello,
    send_hello,
)
from pagewire.kv_transfer.peers import Peers, RunningConnection
from pagewire.kv_transfer.socket_io import tune
from pagewire.kv_transfer.tls import TlsError, explain
from pagewire.kv_transfer.transport import Handler, TransferStats, TransportError

CONNECT_TIMEOUT_S = 5.0
_ACCEPT_RETRY_S = 0.1
_BACKLOG = 128
_WILDCARDS = ("", "0.0.0.0", "::")

logger = logging.getLogger(__name__)


ConnectionT = TypeVar("ConnectionT", bound=RunningConnection)
Opened = TypeVar("Opened", bound=RunningConnection, covariant=True)


class Opening(Protocol[Opened]):
    """One end's part in a connection that is being made."""

    @property
    def note(self) -> bytes:
        """What the other end must know."""

    async def finish(self, sock: socket.socket, hello: Hello) -> Opened:
        """The connection to the sender of `hello`; takes `sock` over. Raises TransportError."""

    def abandon(self) -> None:
        """The connection will not be made."""


class SocketTransport(ABC, Generic[ConnectionT]):
    """Listens on one TCP port and keeps the connections that either end made."""

    kind: str

    def __init__(self, *, incarnation: bytes, handler: Handler, host: str) -> None:
        self.stats = TransferStats()
        self._incarnation = incarnation
        self._handler = handler
        self._host = host
        self._peers: Peers[ConnectionT] = Peers(handler=handler, stats=self.stats)
        self._connecting: dict[bytes, asyncio.Task[ConnectionT]] = {}
        self._accepting: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    @abstractmethod
    def _open(self) -> Opening[ConnectionT]:
        """This end's part in one more connection. Raises TransportError."""

    @property
    def address(self) -> bytes:
        if self._listener is None:
            raise TransportError(f"the {self.kind} transport has no address; start it first")
        return f"{self._host}:{self._listener.getsockname()[1]}".encode()

    async def start(self) -> None:
        if self._host in _WILDCARDS:
            raise TransportError(
                f"host is {self._host!r}, which no peer can connect to; "
                "give the address of one interface"
            )
        try:
            self._listener = await _listen(self._host)
        except OSError as error:
            raise TransportError(
                f"cannot listen on host {self._host!r}: {error}; "
                "give an address that this machine has"
            ) from error
        self._listen_on(self._listener)

    def obstacle(self, address: bytes) -> str | None:
        return None

    async def connect(self, peer: bytes, address: bytes) -> ConnectionT:
        existing = self._peers.get(peer)
        if existing is not None:
            return existing
        task = self._connecting.get(peer)
        if task is None:
            task = asyncio.create_task(self._connect(peer, address))
            self._connecting[peer] = task
            task.add_done_callback(lambda _: self._connecting.pop(peer))
        await asyncio.wait([task])  # not cancelled with this caller: others may wait for it
        if task.cancelled():
            raise TransportError(f"the {self.kind} transport was closed while it connected")
        return task.result()

    def connection(self, peer: bytes) -> ConnectionT | None:
        return self._peers.get(peer)

    async def close(self) -> None:
        listener = self._listener
        if listener is not None and listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        making = [*self._accepting, *self._connecting.values()]
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)
        await self._peers.close()

    def _listen_on(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:  # it may have been closed before a retry
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Take one connection that waits. Not a task, which could be cancelled with it in hand."""
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # who connected has gone again
            return
        except OSError as error:  # out of file descriptors, most likely: this may pass
            logger.warning("cannot accept a %s connection: %s", self.kind, error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_ACCEPT_RETRY_S, self._listen_on, listener)
            return
        sock.setblocking(False)
        task = asyncio.create_task(self._welcome(sock))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)
        task.add_done_callback(partial(_close_unless_begun, sock))

    async def _welcome(self, sock: socket.socket) -> None:
        """Answer one process that connected."""
        try:
            with _undo_on_error(sock.close):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._answer(sock)
        except (OSError, TransportError) as error:
            self.stats.failures += 1
            logger.info("refused a %s connection: %s", self.kind, error or type(error).__name__)

    async def _secure(self, sock: socket.socket, *, is_server: bool) -> socket.socket:
        """What both ends speak over, before either says who it is: `sock`, unless it is wrapped.

        Takes `sock` over. Raises OSError, TransportError.
        """
        return sock

    async def _answer(self, sock: socket.socket) -> None:
        tune(sock)
        sock = await self._secure(sock, is_server=True)
        with _undo_on_error(sock.close):
            await self._greet(sock)

    async def _greet(self, sock: socket.socket) -> None:
        hello = await receive_hello(sock, self.kind)
        if hello.receiver != self._incarnation:
            await send_hello(
                sock, Hello(kind=self.kind, sender=NOBODY, receiver=hello.sender, note=b"")
            )
            raise HandshakeError(
                f"it was meant for incarnation {hello.receiver.hex()}; "
                f"this is {self._incarnation.hex()}"
            )
        await self._peers.end_accepted(hello.sender)
        opening = self._open()
        with _undo_on_error(opening.abandon):
            await send_hello(sock, self._hello(hello.sender, opening.note))
            self._peers.accept(await opening.finish(sock, hello))

    async def _connect(self, peer: bytes, address: bytes) -> ConnectionT:
        where = address.decode(errors="replace")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                dialled = await _dial(where)
                with _undo_on_error(dialled.close):
                    sock = await self._secure(dialled, is_server=False)
                with _undo_on_error(sock.close):
                    return await self._introduce(sock, peer)
        except TimeoutError as error:
            raise TransportError(
                f"no {self.kind} answer from {where} within {CONNECT_TIMEOUT_S:.0f} s; "
                "check that the worker there runs and that no firewall is between"
            ) from error
        except ssl.SSLError as error:
            raise TlsError(f"no {self.kind} connection to {where}: {explain(error)}") from error
        except (OSError, ValueError) as error:
            raise TransportError(
                f"no {self.kind} connection to {where}: {error}; check that the worker there runs"
            ) from error

    async def _introduce(self, sock: socket.socket, peer: bytes) -> ConnectionT:
        opening = self._open()
        with _undo_on_error(opening.abandon):
            await send_hello(sock, self._hello(peer, opening.note))
            hello = await receive_hello(sock, self.kind)
            if hello.sender != peer:
                raise HandshakeError(
                    f"incarnation {hello.sender.hex()} answers instead of {peer.hex()}: "
                    "the worker was restarted; ask the router for its current address"
                )
            connection = await opening.finish(sock, hello)
        self._peers.serve(connection)
        return connection

    def _hello(self, receiver: bytes, note: bytes) -> Hello:
        return Hello(kind=self.kind, sender=self._incarnation, receiver=receiver, note=note)


async def _listen(host: str) -> socket.socket:
    """A listening socket on a free port of `host`. Raises OSError."""
    sock, address = await _socket_for(host, 0)
    with _undo_on_error(sock.close):
        sock.bind(address)
        sock.listen(_BACKLOG)
    return sock


async def _dial(address: str) -> socket.socket:
    """A socket connected to `address`, host:port. Raises OSError, and ValueError for a bad one."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("the address is not host:port")
    sock, target = await _socket_for(host, int(port))
    with _undo_on_error(sock.close):
        await asyncio.get_running_loop().sock_connect(sock, target)
        tune(sock)
    return sock


async def _socket_for(host: str, port: int) -> tuple[socket.socket, Any]:
    """A socket of the family of `host`, and its address there. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    return sock, address


def _close_unless_begun(sock: socket.socket, task: asyncio.Task[None]) -> None:
    """A task that is cancelled before it begins closes nothing itself."""
    if task.cancelled():
        sock.close()


@contextmanager
def _undo_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` unless the block succeeds."""
    with ExitStack() as cleanup:
        cleanup.callback(undo)
        yield
        cleanup.pop_all()
