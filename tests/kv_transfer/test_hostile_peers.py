"""Bytes that no worker would send, thrown at the listening socket and at an open connection."""

import asyncio
import contextlib
import gc
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.kv_transfer.framing import MAX_PAYLOAD_BYTES, Kind
from pagewire.kv_transfer.gloo import GlooTransport
from pagewire.kv_transfer.handshake import NOBODY, Hello
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.messages import MAX_HEADER_BYTES
from pagewire.kv_transfer.select import probe
from pagewire.kv_transfer.shared_memory import Offer, Segment, open_offer
from pagewire.kv_transfer.shm import NUM_SLOTS, RING_BYTES, SLOT_BYTES, ShmTransport
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.ucx import UcxTransport

ME, OTHER, STRANGER = b"m" * 16, b"o" * 16, b"s" * 16
PATIENCE_S = 20.0
KINDS = ["tcp", "shm", "gloo", *(["ucx"] if probe().usable else [])]

AnyTransport = SocketTransport[Any]
CLASSES: dict[str, Callable[..., AnyTransport]] = {
    "tcp": TcpTransport,
    "shm": ShmTransport,
    "gloo": GlooTransport,
    "ucx": UcxTransport,
}
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Inbox:
    """A Handler that takes payloads of up to 1 MiB."""

    def __init__(self) -> None:
        self.delivered: list[bytes] = []
        self.lost_peers: list[bytes] = []
        self.changed = asyncio.Event()

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        return Landing(memoryview(bytearray(length))) if length <= 1 << 20 else None

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.delivered.append(header)
        self.changed.set()

    def lost(self, peer: bytes, reason: str) -> None:
        self.lost_peers.append(peer)
        self.changed.set()


@asynccontextmanager
async def started(kind: str, incarnation: bytes, inbox: Inbox) -> AsyncIterator[AnyTransport]:
    transport = CLASSES[kind](incarnation=incarnation, handler=inbox, host="127.0.0.1")
    await transport.start()
    try:
        yield transport
    finally:
        await transport.close()


async def dial(transport: AnyTransport) -> Streams:
    host, port = transport.address.decode().partition("/")[0].split(":")
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


@pytest.mark.parametrize("num_turns", range(5))
def test_who_connects_while_the_transport_closes_is_disconnected(num_turns: int) -> None:
    """A socket that nobody closes warns when it is collected, which fails the test."""

    async def scenario() -> None:
        async with started("tcp", ME, Inbox()) as transport:
            host, port = transport.address.decode().split(":")
            client = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
            for _ in range(num_turns):
                await asyncio.sleep(0)
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""

    run(scenario())
    gc.collect()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Forged:
    """A message whose fields nobody has checked, with the right checksums."""

    kind: int = Kind.MESSAGE
    header: bytes = b""
    header_bytes: int | None = None  # None: as many as there are
    payload_bytes: int = 0
    payload: bytes = b""
    start: bytes = b"PW\x02"  # magic and version

    def encode(self, number: int) -> bytes:
        """As message `number` of a connection, from 1."""
        header_bytes = len(self.header) if self.header_bytes is None else self.header_bytes
        fields = self.start + struct.pack(
            "!BIQI", self.kind, header_bytes, self.payload_bytes, zlib.crc32(self.header)
        )
        check = zlib.crc32(fields + number.to_bytes(8, "big"))
        return fields + check.to_bytes(4, "big") + self.header + self.payload


def encoded(*messages: Forged) -> bytes:
    """All that one end sends."""
    return b"".join(message.encode(number) for number, message in enumerate(messages, 1))


GOOD = Forged(header=b"good")
BROKEN = {
    "magic": encoded(GOOD, Forged(start=b"XW\x02")),
    "version": encoded(GOOD, Forged(start=b"PW\xff")),
    "kind unknown": encoded(GOOD, Forged(kind=200)),
    "kind of another transport": encoded(GOOD, Forged(kind=Kind.ANNOUNCE, payload_bytes=10)),
    "header over the limit": encoded(GOOD, Forged(header_bytes=MAX_HEADER_BYTES + 1)),
    "payload over the limit": encoded(GOOD, Forged(payload_bytes=MAX_PAYLOAD_BYTES + 1)),
    "truncated prefix": encoded(GOOD, Forged())[:-1],
    "truncated header": encoded(GOOD, Forged(header=b"four", header_bytes=5)),
    "truncated payload": encoded(GOOD, Forged(header=b"h", payload_bytes=1000, payload=bytes(999))),
    "truncated payload that is discarded": encoded(
        GOOD, Forged(payload_bytes=2 << 20, payload=bytes(1000))
    ),
    "repeated": encoded(GOOD) * 2,
    "changed header": encoded(GOOD, GOOD).replace(b"good", b"gold").replace(b"gold", b"good", 1),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_message_closes_only_its_connection(broken: bytes) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started("tcp", ME, inbox) as transport:
            reader, writer = await join_tcp(transport)
            writer.write(broken)
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


@asynccontextmanager
async def joined_shm(transport: AnyTransport) -> AsyncIterator[tuple[Streams, Segment]]:
    """A connection whose handshake is done, under a name of its own, and the ring to fill."""
    offer = Offer(RING_BYTES)
    reader, writer = await dial(transport)
    try:
        mine = Hello(kind="shm", sender=STRANGER, receiver=ME, note=offer.note).encode()
        writer.write(mine)
        theirs = (await reader.readexactly(len(mine)))[-len(offer.note) - 4 : -4]
        incoming = open_offer(theirs, RING_BYTES)
        writer.write(incoming.proof)
        assert await reader.readexactly(len(incoming.proof)) == offer.segment.proof
        incoming.close()
        yield (reader, writer), offer.segment
    finally:
        writer.close()
        offer.close()


def announce(num_bytes: int) -> Forged:
    return Forged(kind=Kind.ANNOUNCE, header=b"h", payload_bytes=num_bytes)


def chunk(num_bytes: int) -> Forged:
    return Forged(kind=Kind.CHUNK, payload_bytes=num_bytes)


FREED = Forged(kind=Kind.FREED)
BROKEN_SHM = {
    "magic": [Forged(start=b"XW\x02")],
    "message with a payload": [Forged(payload_bytes=10)],
    "payload of nothing": [announce(0)],
    "payload over the limit": [announce(MAX_PAYLOAD_BYTES + 1)],
    "chunk of no payload": [chunk(10)],
    "chunk over the payload": [announce(100), chunk(101)],
    "chunk over its slot": [announce(2 * SLOT_BYTES), chunk(SLOT_BYTES + 1)],
    "chunk of nothing": [announce(100), chunk(0)],
    "chunk with a header": [
        announce(100),
        Forged(kind=Kind.CHUNK, header=b"h", payload_bytes=10),
    ],
    "message within a payload": [announce(100), GOOD],
    "payload within a payload": [announce(100), announce(100)],
    "slot that was never filled": [FREED],
    "kind of another transport": [Forged(kind=Kind.READY)],
    "truncated payload": [announce(SLOT_BYTES + 1), chunk(SLOT_BYTES)],
    "truncated payload that is discarded": [announce(2 << 20), chunk(SLOT_BYTES)],
}


@pytest.mark.parametrize("broken", BROKEN_SHM.values(), ids=BROKEN_SHM.keys())
def test_a_broken_message_through_shared_memory(broken: list[Forged]) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started("shm", ME, inbox) as transport:
            async with joined_shm(transport) as ((reader, writer), ring):
                ring.view[:4] = b"good"
                writer.write(encoded(announce(4), chunk(4), *broken))
                writer.write_eof()
                await read_to_end(reader)
            while not inbox.lost_peers:
                inbox.changed.clear()
                await inbox.changed.wait()
            assert inbox.delivered == [b"h"]
            assert transport.stats.failures == 1
            await check_that_it_still_works("shm", transport)

    run(scenario())


def test_a_peer_that_frees_no_slot_gets_no_more_chunks() -> None:
    async def scenario() -> None:
        async with started("shm", ME, Inbox()) as transport, joined_shm(transport) as (streams, _):
            connection = transport.connection(STRANGER)
            while connection is None:
                await asyncio.sleep(0)
                connection = transport.connection(STRANGER)
            payload = memoryview(bytes(2 * RING_BYTES))
            sending = asyncio.create_task(connection.send(b"h", payload))
            chunks = [chunk(SLOT_BYTES)] * NUM_SLOTS
            expected = encoded(announce(len(payload)), *chunks)
            assert await streams[0].readexactly(len(expected)) == expected
            assert not sending.done()
            streams[1].write(encoded(*[FREED] * NUM_SLOTS))
            rest = encoded(announce(len(payload)), *chunks, *chunks)[len(expected) :]
            assert await streams[0].readexactly(len(rest)) == rest
            await sending

    run(scenario())


def test_a_peer_that_cannot_open_the_ring_is_refused() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started("shm", ME, inbox) as transport:
            offer = Offer(RING_BYTES)
            reader, writer = await dial(transport)
            mine = Hello(kind="shm", sender=STRANGER, receiver=ME, note=offer.note).encode()
            writer.write(mine + bytes(len(offer.segment.proof)))  # a proof that it guessed
            await read_to_end(reader)
            writer.close()
            offer.close()
            assert transport.connection(STRANGER) is None
            assert transport.stats.failures == 1
        assert inbox.lost_peers == []

    run(scenario())


def test_half_a_message_blocks_nobody() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with started("tcp", ME, inbox) as transport:
            _, writer = await join_tcp(transport)
            writer.write(encoded(Forged(header=b"half", header_bytes=10, payload_bytes=1000)))
            await check_that_it_still_works("tcp", transport)
            assert inbox.lost_peers in ([], [OTHER])
            writer.close()

    run(scenario())
