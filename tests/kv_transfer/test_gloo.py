"""What is gloo's own: how the ends of a group find each other, and that nothing is left of it."""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import psutil
import pytest

from pagewire.kv_transfer.gloo import GlooTransport
from pagewire.kv_transfer.gloo_device import GlooDevice
from pagewire.kv_transfer.group_link import GroupLink
from pagewire.kv_transfer.handshake import HandshakeError, Hello
from pagewire.kv_transfer.pair_store import PairStore
from pagewire.kv_transfer.transport import ConnectionLost, TransportError

ME, STRANGER = b"m" * 16, b"s" * 16
PATIENCE_S = 20.0
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LARGE = 256 << 20  # bytes that no connection moves at once


class Nobody:
    """A Handler that wants nothing."""

    def place(self, peer: bytes, header: bytes, length: int) -> None:
        return None

    def deliver(self, peer: bytes, header: bytes) -> None:
        raise AssertionError

    def lost(self, peer: bytes, reason: str) -> None:
        raise AssertionError


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario

    asyncio.run(bounded())


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[GroupLink, GroupLink]]:
    device = GlooDevice("127.0.0.1")
    here, there = socket.socketpair()
    with here, there:
        for sock in (here, there):
            sock.setblocking(False)
        links = await asyncio.gather(device.link(here, 0), device.link(there, 1))
    try:
        yield links
    finally:
        for link in links:
            link.close()
            await link.wait_closed()


def new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("closing_end", ["sender", "receiver"])
def test_a_link_that_is_closed_within_a_payload_touches_no_memory_any_more(
    closing_end: str,
) -> None:
    async def scenario() -> None:
        async with linked() as (sender, receiver):
            payload, target = bytearray(b"\xff") * LARGE, bytearray(LARGE)
            sent, received = new_future(), new_future()
            receiver.receive(memoryview(target), received)
            sender.send(memoryview(payload), sent)
            while not target[0]:
                await asyncio.sleep(0)
            (sender if closing_end == "sender" else receiver).close()
            num_received = target.count(b"\xff")
            results = await asyncio.gather(sent, received, return_exceptions=True)
            # None: rarely, the payload was faster.
            assert {type(result) for result in results} <= {ConnectionLost, type(None)}
            for link in (sender, receiver):
                link.close()
                await link.wait_closed()
            if closing_end == "receiver":
                assert target.count(b"\xff") == num_received

    run(scenario())


def test_transfers_that_wait_behind_another_end_with_the_link() -> None:
    async def scenario() -> None:
        async with linked() as (sender, _):
            waiting = [new_future() for _ in range(3)]
            for done in waiting:
                sender.send(memoryview(bytearray(100)), done)
            sender.close()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(result) for result in results] == [ConnectionLost] * 3

    run(scenario())


def test_nothing_is_left_of_a_link() -> None:
    def in_use() -> tuple[int, int]:
        """Threads of the process, torch's included, and open descriptors."""
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    async def scenario() -> None:
        async with linked() as (sender, receiver):
            sent, received = new_future(), new_future()
            receiver.receive(memoryview(bytearray(5)), received)
            sender.send(memoryview(b"bytes"), sent)
            await asyncio.gather(sent, received)
            assert "gloo-send_0" in [thread.name for thread in threading.enumerate()]

    run(scenario())
    before = in_use()
    num_links = 8
    for _ in range(num_links):
        run(scenario())
    # gloo's own threads end in the background, so those of the last links may still be there.
    assert all(now < then + num_links for now, then in zip(in_use(), before, strict=True))


def test_gloo_listens_where_the_worker_does() -> None:
    def listening() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections("tcp")
        return {(*item.laddr,) for item in found if item.status == psutil.CONN_LISTEN}

    async def scenario() -> None:
        before = listening()
        transport = GlooTransport(incarnation=ME, handler=Nobody(), host="127.0.0.1")
        await transport.start()
        hosts = [host for host, _ in listening() - before]
        assert hosts == ["127.0.0.1"] * 2  # for headers and for payloads
        await transport.close()

    run(scenario())


def test_a_host_that_this_machine_does_not_have() -> None:
    async def scenario() -> None:
        transport = GlooTransport(incarnation=ME, handler=Nobody(), host="192.0.2.1")
        with pytest.raises(TransportError, match="an address that this machine has"):
            await transport.start()
        await transport.close()

    run(scenario())


@asynccontextmanager
async def greeted(note: bytes) -> AsyncIterator[tuple[GlooTransport, Streams]]:
    """A transport, and the streams of a stranger who has sent his Hello and read the answer."""
    transport = GlooTransport(incarnation=ME, handler=Nobody(), host="127.0.0.1")
    await transport.start()
    host, port = transport.address.decode().split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        hello = Hello(kind="gloo", sender=STRANGER, receiver=ME, note=note).encode()
        writer.write(hello)
        version = GlooDevice("127.0.0.1").version
        await reader.readexactly(len(hello) - len(note) + len(version))
        yield transport, (reader, writer)
    finally:
        writer.close()
        await transport.close()


async def refused(transport: GlooTransport, reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionResetError):
        await reader.read()
    while not transport.stats.failures:
        await asyncio.sleep(0)
    assert transport.connection(STRANGER) is None


def test_another_version_of_torch_is_refused() -> None:
    async def scenario() -> None:
        async with greeted(b"1.0") as (transport, (reader, _)):
            await refused(transport, reader)

    run(scenario())


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x03\x00\x05key", b"\x00\x00\x00", b"\x01\x00\x01kv" * 65],
    ids=["nothing", "half an entry", "no entry", "too many entries"],
)
def test_a_peer_that_does_not_join_the_group_is_refused(answer: bytes) -> None:
    async def scenario() -> None:
        version = GlooDevice("127.0.0.1").version
        async with greeted(version) as (transport, (reader, writer)):
            writer.write(answer)
            writer.write_eof()
            await refused(transport, reader)

    run(scenario())


def test_a_store_has_what_either_end_has_set() -> None:
    async def scenario() -> None:
        here, there = socket.socketpair()
        with here, there:
            for sock in (here, there):
                sock.setblocking(False)
            mine, theirs = PairStore(here), PairStore(there)
            receiving = asyncio.create_task(theirs.receive())
            waiting = asyncio.create_task(asyncio.to_thread(theirs.get, "key"))
            await asyncio.to_thread(mine.set, "key", b"value")
            assert await waiting == mine.get("key") == b"value"
            await mine.finish()
            await receiving
            theirs.close()
            with pytest.raises(ConnectionLost, match="another"):
                theirs.get("another")

    run(scenario())


def test_too_many_keys_end_a_store() -> None:
    async def scenario() -> None:
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            store = PairStore(here)
            there.sendall(b"\x01\x00\x01kv" * 65)
            with pytest.raises(HandshakeError, match="more than 64"):
                await store.receive()
            with pytest.raises(ConnectionLost):
                store.get("never")

    run(scenario())
