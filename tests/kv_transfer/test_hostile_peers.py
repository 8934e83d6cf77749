"""Bytes that no worker would send, thrown at the listening socket and at an open connection."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.kv_transfer.framing import MAX_PAYLOAD_BYTES, PREFIX_BYTES, Kind, Prefix
from pagewire.kv_transfer.handshake import NOBODY, Hello
from pagewire.kv_transfer.messages import MAX_HEADER_BYTES
from pagewire.kv_transfer.select import probe
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.ucx import UcxTransport

ME, OTHER, STRANGER = b"m" * 16, b"o" * 16, b"s" * 16
PATIENCE_S = 20.0
KINDS = ["tcp", *(["ucx"] if probe().usable else [])]

AnyTransport = SocketTransport[Any]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Inbox:
    """A Handler that takes payloads of up to 1 MiB."""

    def __init__(self) -> None:
        self.delivered: list[bytes] = []
        self.lost_peers: list[bytes] = []
        self.changed = asyncio.Event()

    def place(self, peer: bytes, header: bytes, length: int) -> memoryview | None:
        return memoryview(bytearray(length)) if length <= 1 << 20 else None

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.delivered.append(header)
        self.changed.set()

    def lost(self, peer: bytes, reason: str) -> None:
        self.lost_peers.append(peer)
        self.changed.set()


@asynccontextmanager
async def started(kind: str, incarnation: bytes, inbox: Inbox) -> AsyncIterator[AnyTransport]:
    create: Callable[..., AnyTransport] = TcpTransport if kind == "tcp" else UcxTransport
    transport = create(incarnation=incarnation, handler=inbox, host="127.0.0.1")
    await transport.start()
    try:
        yield transport
    finally:
        await transport.close()


async def dial(transport: AnyTransport) -> Streams:
    host, port = transport.address.decode().split(":")
    return await asyncio.open_connection(host, int(port))


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def join_tcp(transport: AnyTransport) -> Streams:
    """A connection whose handshake is done, under a name of its own."""
    reader, writer = await dial(transport)
    hello = Hello(kind="tcp", sender=STRANGER, receiver=ME, note=b"").encode()
    writer.write(hello)
    await reader.readexactly(len(hello))
    return reader, writer


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario

    asyncio.run(bounded())


async def check_that_it_still_works(kind: str, transport: AnyTransport) -> None:
    async with started(kind, OTHER, Inbox()) as other:
        connection = await other.connect(ME, transport.address)
        await connection.send(b"works", memoryview(b"payload"))


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_instead_of_a_handshake(kind: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(garbage=st.binary(max_size=200))
    def check(garbage: bytes) -> None:
        run(scenario(garbage))

    async def scenario(garbage: bytes) -> None:
        inbox = Inbox()
        async with started(kind, ME, inbox) as transport:
            reader, writer = await dial(transport)
            writer.write(garbage)
            writer.write_eof()
            assert await read_to_end(reader) == b""
            writer.close()
        assert inbox.lost_peers == inbox.delivered == []
        assert transport.stats.failures == 1

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_stranger_blocks_nobody(kind: str) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started(kind, ME, inbox) as transport:
            _, writer = await dial(transport)
            writer.write(b"PGW")  # the beginning of a handshake, and no more
            await check_that_it_still_works(kind, transport)
            writer.close()

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_does_not_learn_who_answers(kind: str) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started(kind, ME, inbox) as transport:
            reader, writer = await dial(transport)
            mine = Hello(kind=kind, sender=STRANGER, receiver=OTHER, note=b"")
            theirs = Hello(kind=kind, sender=NOBODY, receiver=STRANGER, note=b"")
            writer.write(mine.encode())
            assert await read_to_end(reader) == theirs.encode()
            writer.close()
        assert inbox.lost_peers == []

    run(scenario())


def test_another_transport_at_the_address() -> None:
    async def scenario() -> None:
        async with started("tcp", ME, Inbox()) as transport:
            reader, writer = await dial(transport)
            writer.write(Hello(kind="ucx", sender=OTHER, receiver=ME, note=b"").encode())
            assert await read_to_end(reader) == b""
            writer.close()

    run(scenario())


def prefix(kind: int = Kind.MESSAGE, header_bytes: int = 0, payload_bytes: int = 0) -> bytes:
    """A prefix whose fields nobody has checked."""
    good = Prefix(kind=Kind.MESSAGE).encode()
    return good[:3] + struct.pack("!BIQ", kind, header_bytes, payload_bytes)


BROKEN = {
    "magic": b"XX" + prefix()[2:],
    "version": prefix()[:2] + b"\xff" + prefix()[3:],
    "kind unknown": prefix(kind=200),
    "kind of another transport": prefix(kind=Kind.ANNOUNCE, payload_bytes=10),
    "header over the limit": prefix(header_bytes=MAX_HEADER_BYTES + 1),
    "payload over the limit": prefix(payload_bytes=MAX_PAYLOAD_BYTES + 1),
    "truncated prefix": prefix()[: PREFIX_BYTES - 1],
    "truncated header": prefix(header_bytes=5) + b"four",
    "truncated payload": prefix(header_bytes=1, payload_bytes=1000) + b"h" + bytes(999),
    "truncated payload that is discarded": prefix(payload_bytes=2 << 20) + bytes(1000),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_message_closes_only_its_connection(broken: bytes) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started("tcp", ME, inbox) as transport:
            reader, writer = await join_tcp(transport)
            writer.write(prefix(header_bytes=4) + b"good" + broken)
            writer.write_eof()
            assert await read_to_end(reader) == b""
            writer.close()
            while not inbox.lost_peers:
                inbox.changed.clear()
                await inbox.changed.wait()
            assert inbox.delivered == [b"good"]
            assert transport.stats.failures == 1
            await check_that_it_still_works("tcp", transport)
        assert inbox.lost_peers == [STRANGER, OTHER]

    run(scenario())


def test_half_a_message_blocks_nobody() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started("tcp", ME, inbox) as transport:
            _, writer = await join_tcp(transport)
            writer.write(prefix(header_bytes=10, payload_bytes=1000) + b"half")
            await check_that_it_still_works("tcp", transport)
            assert inbox.lost_peers in ([], [OTHER])
            writer.close()

    run(scenario())
