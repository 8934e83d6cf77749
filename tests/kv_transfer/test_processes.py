"""Transports between real processes, one of which is killed in the middle of transfers."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.select import create_transports, probe
from pagewire.kv_transfer.transport import Connection, ConnectionLost, Transport

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("peer_process.py")
KINDS = ["tcp", "shm", "gloo", *(["ucx"] if probe().usable else [])]
PATIENCE_S = 30.0
MARK = b"\xee"


class Sink:
    """Keeps every buffer that it placed, and marks them all when the peer is lost."""

    def __init__(self) -> None:
        self.buffers: list[bytearray] = []
        self.received: dict[bytes, bytearray] = {}
        self.reasons: list[str] = []
        self._changed = asyncio.Event()
        self._placed: dict[bytes, bytearray] = {}

    def place(self, peer: bytes, header: bytes, length: int) -> Landing:
        buffer = bytearray(length)
        self.buffers = [*self.buffers[-15:], buffer]
        self._placed[header] = buffer
        return Landing(memoryview(buffer))

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.received[header] = self._placed.pop(header, bytearray())
        self._changed.set()

    def lost(self, peer: bytes, reason: str) -> None:
        for buffer in self.buffers:
            buffer[:] = MARK * len(buffer)
        self.reasons.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A transport in this process, connected to one in another."""

    connection: Connection
    transport: Transport
    sink: Sink
    process: asyncio.subprocess.Process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)


@asynccontextmanager
async def remote(kind: str, behaviour: str) -> AsyncIterator[Remote]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        SCRIPT,
        kind,
        behaviour,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert process.stdin is not None and process.stdout is not None
    sink = Sink()
    transport = create_transports(kind, os.urandom(16), sink, "127.0.0.1").transports[0]
    try:
        async with asyncio.timeout(PATIENCE_S):
            incarnation, address = (await process.stdout.readline()).split()
            await transport.start()
            connection = await transport.connect(bytes.fromhex(incarnation.decode()), address)
            yield Remote(connection=connection, transport=transport, sink=sink, process=process)
    finally:
        await transport.close()
        process.stdin.close()
        await process.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_payloads_come_back_unchanged(kind: str) -> None:
    async def scenario() -> None:
        async with remote(kind, "echo") as r:
            sizes = (0, 1, 4095, 4096, 4097, 77_777, 1 << 20, 4 << 20, (4 << 20) + 1)
            sent = {b"%d" % size: os.urandom(size) for size in sizes}
            async with asyncio.TaskGroup() as group:
                for header, payload in sent.items():
                    group.create_task(r.connection.send(header, memoryview(payload)))
            await r.sink.until(lambda: len(r.sink.received) == len(sent))
            assert r.sink.received == sent

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_it_sends(kind: str) -> None:
    async def scenario() -> None:
        async with remote(kind, "stream") as r:
            await r.connection.send(b"begin")
            await r.sink.until(lambda: len(r.sink.received) >= 6)
            r.kill()
            await r.sink.until(lambda: r.sink.reasons)
            with pytest.raises(ConnectionLost):
                await r.connection.send(b"late", memoryview(bytes(100)))
            buffers = list(r.sink.buffers)
        async with remote(kind, "echo") as other:  # the transport code runs on
            await other.connection.send(b"alive", memoryview(bytes(4 << 20)))
            await other.sink.until(lambda: other.sink.received)
        assert r.sink.reasons == ["the peer closed the connection"]
        assert all(buffer == MARK * len(buffer) for buffer in buffers)

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_it_receives(kind: str) -> None:
    async def scenario() -> None:
        async with remote(kind, "swallow") as r:
            payload = memoryview(os.urandom(4 << 20))
            await r.connection.send(b"first", payload)

            async def send_until_lost() -> None:
                while True:
                    await r.connection.send(b"more", payload)

            senders = [asyncio.create_task(send_until_lost()) for _ in range(4)]
            await r.connection.send(b"second", payload)
            r.kill()
            results = await asyncio.gather(*senders, return_exceptions=True)
            assert [type(result) for result in results] == [ConnectionLost] * 4
            await r.sink.until(lambda: r.sink.reasons)
            assert r.transport.connection(r.connection.peer) is None
        assert len(r.sink.reasons) == 1
        assert r.transport.stats.failures == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_losing_a_sender_leaks_neither_descriptors_nor_memory(kind: str) -> None:
    async def lose_a_peer() -> int:
        """Open descriptors afterwards."""
        async with remote(kind, "stream") as r:
            await r.connection.send(b"begin")
            await r.sink.until(lambda: len(r.sink.received) >= 3)
            r.kill()
            await r.sink.until(lambda: r.sink.reasons)
        assert "memfd:pagewire" not in Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd"))

    async def scenario() -> None:
        first = await lose_a_peer()  # opens what stays for the process
        # Fewer are no fault: what other tests left behind may be collected meanwhile.
        assert max([await lose_a_peer() for _ in range(3)]) <= first

    asyncio.run(scenario())
