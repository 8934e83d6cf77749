"""Whole reads and writes on a non-blocking socket, without copies or joins."""

import asyncio
import socket
import ssl
from collections import deque
from itertools import islice

from pagewire.kv_transfer.landing import Landing

PEER_CLOSED = "the peer closed the connection"
_TURN_BYTES = 1024 * 1024  # copied before everything else on the loop gets its turn
# So many are waited for: not for every segment that arrives, as a wake-up costs as much as 50 KiB.
_WAKE_UP_BYTES = 512 * 1024
_MAX_RECORD_BYTES = (1 << 14) + 512  # of TLS
_MAX_PARTS = 1024  # of one system call, on Linux as elsewhere


def tune(sock: socket.socket) -> None:
    """Prepare a connected socket for small messages between large ones.

    A peer whose machine vanished is noticed after about ten seconds, by probes when the
    connection is idle and by missing acknowledgements when it is not.
    """
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 4),  # seconds
        ("TCP_KEEPINTVL", 2),  # seconds
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 10_000),  # milliseconds
    ):
        if hasattr(socket, option):  # not on every operating system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def receive_into(sock: socket.socket, buffer: bytearray | memoryview) -> None:
    """Fill `buffer`. Raises OSError, and ConnectionResetError when the peer closed before."""
    rest = memoryview(buffer)
    try:
        while rest:
            try:
                count = sock.recv_into(rest[:_TURN_BYTES])
            except BlockingIOError:
                _wake_up_at(sock, min(len(rest), _WAKE_UP_BYTES))
                await readable(sock)
                continue
            if count == 0:
                raise ConnectionResetError(PEER_CLOSED)
            rest = rest[count:]
            if rest:
                await asyncio.sleep(0)  # while bytes are there, receiving never waits by itself
    finally:
        _wake_up_at(sock, 1)


async def receive_to(sock: socket.socket, landing: Landing) -> None:
    """Fill `landing`. Raises like receive_into."""
    try:
        while not landing.is_full:
            try:
                count = landing.receive(sock, _TURN_BYTES)
            except BlockingIOError:
                _wake_up_at(sock, len(landing.next_piece(_WAKE_UP_BYTES)))
                await readable(sock)
                continue
            if count == 0:
                raise ConnectionResetError(PEER_CLOSED)
            await asyncio.sleep(0)  # while bytes are there, receiving never waits by itself
    finally:
        _wake_up_at(sock, 1)


async def receive(sock: socket.socket, num_bytes: int) -> bytes:
    """The next `num_bytes`, which the caller has bounded. Raises like receive_into."""
    buffer = bytearray(num_bytes)
    await receive_into(sock, buffer)
    return bytes(buffer)


async def send(sock: socket.socket, *buffers: bytes | memoryview) -> None:
    """Send all of `buffers`, in order, in as few system calls as the socket takes them in.

    Raises OSError.
    """
    rest = deque(memoryview(buffer) for buffer in buffers)
    while rest:
        try:
            num_sent = sock.sendmsg(islice(rest, _MAX_PARTS))
        except BlockingIOError:
            await writable(sock)
            continue
        while rest and num_sent >= len(rest[0]):
            num_sent -= len(rest.popleft())
        if num_sent:
            rest[0] = rest[0][num_sent:]


def _wake_up_at(sock: socket.socket, num_bytes: int) -> None:
    """Let `sock` be readable once so many bytes are there, or once it has ended."""
    if isinstance(sock, ssl.SSLSocket):  # which may hold a part of them back, to decrypt it
        num_bytes = max(1, num_bytes - _MAX_RECORD_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)


async def readable(sock: socket.socket) -> None:
    """Wait until bytes are there for `sock`, or it has ended."""
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()
    loop.add_reader(sock, woken.set)
    try:
        await woken.wait()
    finally:
        loop.remove_reader(sock)


async def writable(sock: socket.socket) -> None:
    """Wait until `sock` takes bytes again, or has ended."""
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()
    loop.add_writer(sock, woken.set)
    try:
        await woken.wait()
    finally:
        loop.remove_writer(sock)


def why_ended(error: Exception) -> str:
    """What to tell the Handler about a connection that ended with `error`."""
    if isinstance(error, (ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError)):
        return PEER_CLOSED
    return str(error)
