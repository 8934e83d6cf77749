"""UCX between workers with pages on GPUs, whose memory is the host's here."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from fake_device import FakeDeviceMemory

from pagewire.kv_transfer.device_memory import DeviceLanding
from pagewire.kv_transfer.handshake import HandshakeError, Hello
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.select import probe
from pagewire.kv_transfer.transport import ConnectionLost
from pagewire.kv_transfer.ucx import UcxTransport, _offer_of
from pagewire.kv_transfer.ucx_library import UcxLibrary

pytestmark = pytest.mark.skipif(not probe().usable, reason="ucxx is not installed")

A, B = b"a" * 16, b"b" * 16
NUM_BYTES = 1 << 20


class Inbox:
    """Gives payloads from a device a place on one, and others one in host memory."""

    def __init__(self, num_bytes: int) -> None:
        self.on_device = torch.zeros(num_bytes, dtype=torch.uint8)
        self.in_host_memory = bytearray(num_bytes)
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self.placed = asyncio.Event()
        self.reasons: list[str] = []
        self.is_lost = asyncio.Event()

    def place(self, peer: bytes, header: bytes, length: int) -> Landing:
        self.placed.set()
        if header.startswith(b"device"):
            return DeviceLanding(FakeDeviceMemory(self.on_device[:length]))
        return Landing(memoryview(self.in_host_memory)[:length])

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.arrived.put_nowait(header)

    def lost(self, peer: bytes, reason: str) -> None:
        self.reasons.append(reason)
        self.is_lost.set()


class Settled:
    """A device that takes its time over its last copies."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.may_end = threading.Event()

    def __call__(self) -> None:
        self.num_calls += 1
        assert self.may_end.wait(60)


@asynccontextmanager
async def pair(
    settled: Settled, num_bytes: int = NUM_BYTES
) -> AsyncIterator[tuple[UcxTransport, UcxTransport, Inbox]]:
    inbox = Inbox(num_bytes)
    a = UcxTransport(incarnation=A, handler=Inbox(0), host="127.0.0.1", settle_device=lambda: None)
    b = UcxTransport(incarnation=B, handler=inbox, host="127.0.0.1", settle_device=settled)
    await a.start()
    await b.start()
    try:
        yield a, b, inbox
    finally:
        settled.may_end.set()
        await a.close()
        await b.close()


@pytest.fixture(autouse=True)
def ucx_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UcxLibrary, "moves_gpu_memory", True)


def test_payloads_of_devices_and_of_hosts_arrive_in_one_order() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(60), pair(Settled()) as (a, b, inbox):
            connection = await a.connect(B, b.address)
            assert connection.on_device is not None
            data = torch.arange(NUM_BYTES).to(torch.uint8)
            host = bytes(range(255, -1, -1)) * 16
            await asyncio.gather(
                connection.on_device.send_from_device(b"device 0", FakeDeviceMemory(data)),
                connection.send(b"host 1", memoryview(host)),
                connection.on_device.send_from_device(b"device 2", FakeDeviceMemory(data[:8])),
                connection.send(b"none 3"),
            )
            headers = [await inbox.arrived.get() for _ in range(4)]
            assert headers == [b"device 0", b"host 1", b"device 2", b"none 3"]
            assert torch.equal(inbox.on_device, data)
            assert inbox.in_host_memory[: len(host)] == host
            assert a.stats.bytes_sent == b.stats.bytes_received == NUM_BYTES + len(host) + 8

    asyncio.run(scenario())


def test_a_peer_is_lost_only_when_the_device_has_made_its_last_copies() -> None:
    """Then its slots may be used again."""
    settled = Settled()

    async def scenario() -> None:
        async with asyncio.timeout(60), pair(settled) as (a, b, inbox):
            connection = await a.connect(B, b.address)
            await connection.send(b"message")
            assert await inbox.arrived.get() == b"message"
            connection.close()
            while not settled.num_calls:
                await asyncio.sleep(0)
            assert not inbox.is_lost.is_set()
            settled.may_end.set()
            await inbox.is_lost.wait()

    asyncio.run(scenario())


def test_what_cannot_arrive_any_more_is_a_lost_connection() -> None:
    num_bytes = 64 << 20

    async def scenario() -> None:
        async with asyncio.timeout(60), pair(Settled(), num_bytes) as (a, b, inbox):
            connection = await a.connect(B, b.address)
            assert connection.on_device is not None
            memory = FakeDeviceMemory(torch.zeros(num_bytes, dtype=torch.uint8))
            sending = asyncio.create_task(connection.on_device.send_from_device(b"device", memory))
            await inbox.placed.wait()
            connection.close()
            with pytest.raises(ConnectionLost):
                await sending
            with pytest.raises(ConnectionLost):
                await connection.on_device.send_from_device(b"device", memory)
            assert inbox.arrived.empty()

    asyncio.run(scenario())


@pytest.mark.parametrize("note", [b"", b"\2address"])
def test_a_note_of_another_release_is_refused(note: bytes) -> None:
    with pytest.raises(HandshakeError, match="run the same release on both"):
        _offer_of(Hello(kind="ucx", sender=A, receiver=B, note=note))
