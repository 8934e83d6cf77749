"""Payloads staged on a device, and what NCCL shares with gloo: run through gloo, on the CPU."""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch

from pagewire.kv_transfer import nccl_device
from pagewire.kv_transfer.gloo_device import GlooDevice
from pagewire.kv_transfer.gloo_group import disconnect
from pagewire.kv_transfer.group_link import GroupLink
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.nccl import NcclTransport
from pagewire.kv_transfer.select import create_transports, probe
from pagewire.kv_transfer.staged_group import StagedGroup
from pagewire.kv_transfer.transport import ConnectionLost, TransportError

PATIENCE_S = 20.0
ME = b"m" * 16


class Nobody:
    """A Handler that is never called."""

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        raise AssertionError

    def deliver(self, peer: bytes, header: bytes) -> None:
        raise AssertionError

    def lost(self, peer: bytes, reason: str) -> None:
        raise AssertionError


class Streams:
    """Counts the streams that calls were made on."""

    def __init__(self) -> None:
        self.num_open = 0
        self.num_ended = 0
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self.num_open += 1
        yield
        with self._lock:
            self.num_open -= 1
            self.num_ended += 1


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario

    asyncio.run(bounded())


async def join(device: GlooDevice, sock: socket.socket, rank: int, streams: Streams) -> StagedGroup:
    groups = [await device.group(sock, rank) for _ in range(2)]
    group = StagedGroup(
        outgoing=groups[rank],
        incoming=groups[1 - rank],
        device="cpu",
        stream=streams,
        abort=disconnect,
    )
    await asyncio.to_thread(group.connect)
    return group


@asynccontextmanager
async def linked(streams: Streams) -> AsyncIterator[tuple[GroupLink, GroupLink]]:
    device = GlooDevice("127.0.0.1")
    here, there = socket.socketpair()
    with here, there:
        for sock in (here, there):
            sock.setblocking(False)
        groups = await asyncio.gather(
            join(device, here, 0, streams), join(device, there, 1, streams)
        )
    links = GroupLink(groups[0], "staged"), GroupLink(groups[1], "staged")
    try:
        yield links
    finally:
        for link in links:
            link.close()
            await link.wait_closed()


def new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def test_payloads_arrive_in_order_in_both_directions_at_once() -> None:
    streams = Streams()

    async def scenario() -> None:
        async with linked(streams) as (one, other):
            payloads = [os.urandom(size) for size in (1, 70_000, 3 << 20)]
            ends, targets = [], []
            for payload in payloads:
                for sender, receiver in ((one, other), (other, one)):
                    target, done = bytearray(len(payload)), [new_future(), new_future()]
                    sender.send(memoryview(payload), done[0])
                    receiver.receive(memoryview(target), done[1])
                    targets.append(target)
                    ends += done
            await asyncio.gather(*ends)
            assert targets == [payload for payload in payloads for _ in range(2)]
        assert streams.num_open == 0 and streams.num_ended > len(ends)

    run(scenario())


@pytest.mark.parametrize("closing_end", ["sender", "receiver"])
def test_a_place_is_never_written_once_the_link_is_closed(closing_end: str) -> None:
    async def scenario() -> None:
        async with linked(Streams()) as (sender, receiver):
            target, received = bytearray(1 << 20), new_future()
            receiver.receive(memoryview(target), received)
            (sender if closing_end == "sender" else receiver).close()
            if closing_end == "sender":  # the connection for headers tells the other end
                receiver.close()
            with pytest.raises(ConnectionLost):
                await received
            await receiver.wait_closed()
            assert target == bytes(1 << 20)

    run(scenario())


def test_an_aborted_call_that_returns_as_if_it_had_succeeded_writes_nothing() -> None:
    """So do those of NCCL: the kernel ends, and so does the wait for its stream."""

    class Work:
        def __init__(self, aborted: threading.Event) -> None:
            self._aborted = aborted

        def wait(self) -> None:
            self._aborted.wait(PATIENCE_S)

    class Group:
        def __init__(self) -> None:
            self.aborted = threading.Event()
            self.started = threading.Event()

        def rank(self) -> int:
            return 0

        def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
            tensors[0].fill_(0xFF)
            self.started.set()
            return Work(self.aborted)

    group = Group()
    staged = StagedGroup(
        outgoing=group,
        incoming=group,
        device="cpu",
        stream=Streams(),
        abort=lambda each: each.aborted.set(),
    )
    target, errors = bytearray(10), list[RuntimeError]()

    def receive() -> None:
        try:
            staged.receive(memoryview(target))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    assert group.started.wait(PATIENCE_S)
    staged.disconnect()
    thread.join()
    assert [str(error) for error in errors] == ["the group was aborted"]
    assert target == bytes(10)


@pytest.mark.parametrize(
    ("device", "has_nccl", "has_gpu", "message"),
    [
        ("cpu", True, True, "workers run on cpu"),
        ("cuda:0", False, True, "torch has no NCCL; install one with CUDA"),
        ("cuda:0", True, False, "check nvidia-smi"),
    ],
)
def test_nccl_is_refused_where_it_cannot_be(
    device: str, has_nccl: bool, has_gpu: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(TransportError, match=message):
        create_transports("nccl", ME, Nobody(), "127.0.0.1", device=device)


def test_the_transport_refuses_to_start_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")

    async def scenario() -> None:
        transport = NcclTransport(
            incarnation=ME, handler=Nobody(), host="127.0.0.1", device="cuda:0"
        )
        with pytest.raises(TransportError, match="use shm, ucx or tcp"):
            await transport.start()
        await transport.close()

    run(scenario())


@pytest.mark.parametrize("has_ucx", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_auto_takes_nccl_for_gpus_without_ucx(
    device: str, has_ucx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_ucx and not probe().usable:
        pytest.skip(probe().explanation)
    if not has_ucx:
        monkeypatch.setitem(sys.modules, "ucxx", None)
    monkeypatch.setattr(nccl_device, "require_nccl", lambda device: None)
    choice = create_transports("auto", ME, Nobody(), "127.0.0.1", device=device)
    kinds = [transport.kind for transport in choice.transports]
    assert ("nccl" in kinds) == (device != "cpu" and not has_ucx)
    assert kinds[-1] == "tcp"


def test_auto_goes_on_with_tcp_where_a_gpu_has_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    choice = create_transports("auto", ME, Nobody(), "127.0.0.1", device="cuda:0")
    assert choice.transports[-1].kind == "tcp"
    assert "torch has no NCCL" in choice.explanation
