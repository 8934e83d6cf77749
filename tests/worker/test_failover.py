"""A pair of workers leaves a transport that fails and comes back to it: real sockets, a proxy that
breaks the preferred one, and virtual time.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from fault_proxy import Fault, FaultPlan, FaultProxy
from handoff_pair import DECODE, PREFILL
from linked_pair import LinkedPair, LinkedWorker, Recorder

from pagewire.kv_transfer.circuit import CircuitLimits
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.tasks import TaskSet

PATIENCE_S = 60.0
COOLDOWN_S = 20.0
LIMITS = CircuitLimits(max_losses=2, cooldown_s=COOLDOWN_S)
IN_A_FRAME = 1500  # bytes that P has sent then


class Preferred(TcpTransport):
    """Stands for a transport that is better than tcp."""

    kind = "ucx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Two workers with two ways between them, of which the better leads through a proxy."""

    pair: LinkedPair
    proxy: FaultProxy
    addresses: tuple[tuple[str, bytes], ...]

    async def hand_off(self) -> bool:
        """Whether it succeeded."""
        await self.pair.run(*self.addresses)
        for worker in (self.pair.prefill, self.pair.decode):
            worker.core.check_integrity()
            assert worker.core.pool.num_available == worker.core.pool.num_pages
        return self.pair.has_finished and not self.pair.failures

    async def until_over(self, transport: str) -> None:
        """Let time pass until the pair uses this one: a connection is made in real time."""
        while self.transport != transport:
            await self.pair.pass_time(1.0)

    @property
    def links(self) -> list[pb.KvLink]:
        return self.pair.prefill.connections.states()

    @property
    def transport(self) -> str:
        [link] = self.links
        return link.transport


def start(worker: LinkedWorker, name: bytes) -> list[Recorder]:
    pairs = OneConnection(worker)
    transports = [
        Recorder(kind(incarnation=name, handler=pairs.lane(kind.kind), host="127.0.0.1"))
        for kind in (Preferred, TcpTransport)
    ]
    pairs.join(transports)
    worker.start(*transports, pairs=pairs, limits=LIMITS)
    return transports


@asynccontextmanager
async def cluster(fault: Fault, offset: int = IN_A_FRAME) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        tasks = TaskSet()
        stack.push_async_callback(tasks.cancel)
        pair = LinkedPair(tasks)
        for worker, name in ((pair.prefill, PREFILL), (pair.decode, DECODE)):
            transports = start(worker, name)
            for transport in transports:
                await transport.start()
            stack.push_async_callback(worker.close)
        preferred, tcp = transports  # of the decode worker
        plan = FaultPlan(fault=fault, upstream=True, offset=offset, length=1)
        target = preferred.address.decode()
        proxy = await stack.enter_async_context(FaultProxy(target, plan).run())
        yield Cluster(
            pair=pair,
            proxy=proxy,
            addresses=(("ucx", proxy.address.encode()), ("tcp", tcp.address)),
        )


def run(scenario: Callable[[Cluster], Coroutine[Any, Any, None]], fault: Fault) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S), cluster(fault) as made:
            await scenario(made)

    asyncio.run(bounded())


@pytest.mark.parametrize(("fault", "num_failures"), [(Fault.HALF_OPEN, 1), (Fault.CUT, 2)])
def test_a_pair_leaves_a_broken_transport_and_comes_back(fault: Fault, num_failures: int) -> None:
    async def scenario(made: Cluster) -> None:
        for _ in range(num_failures):  # one stall is enough, a lost connection is not
            assert not await made.hand_off()
        assert await made.hand_off()
        assert made.transport == "tcp"
        [given_up] = made.links[0].given_up
        assert given_up.transport == "ucx" and 0 < given_up.retry_in_s <= COOLDOWN_S
        assert given_up.cause == ("stalled" if fault is Fault.HALF_OPEN else "lost")
        made.proxy.heal()
        await made.until_over("ucx")
        assert await made.hand_off()
        assert made.transport == "ucx" and not made.links[0].given_up
        assert made.pair.prefill.connections.num_trips == {"ucx": 1, "tcp": 0}

    run(scenario, fault)


def test_without_a_fault_the_better_transport_is_used_throughout() -> None:
    async def scenario(made: Cluster) -> None:
        for _ in range(3):
            assert await made.hand_off()
            await made.pair.pass_time(COOLDOWN_S)
            assert made.transport == "ucx"

    run(scenario, Fault.NONE)


def test_a_transport_that_stays_broken_is_tried_again_without_harm() -> None:
    async def scenario(made: Cluster) -> None:
        assert not await made.hand_off()
        assert await made.hand_off()
        made.proxy.refuse()
        num_trips = made.pair.prefill.connections.num_trips
        while num_trips["ucx"] < 4:
            await made.pair.pass_time(COOLDOWN_S)
            assert await made.hand_off()
            assert made.transport == "tcp"
        made.proxy.heal()
        await made.until_over("ucx")
        assert await made.hand_off()

    run(scenario, Fault.HALF_OPEN)


def test_the_decode_worker_follows_while_it_takes_the_old_connection_for_alive() -> None:
    async def scenario(made: Cluster) -> None:
        made.proxy.heal()
        assert await made.hand_off()
        decode = made.pair.decode.connections
        before = decode.get(PREFILL)
        assert before is not None
        made.proxy.silence()  # the prefill worker's end of it is gone, nobody tells the other
        made.pair.prefill.connections.give_up(DECODE)
        await made.pair.pass_time(1.0)
        assert decode.transports["ucx"].connection(PREFILL) is not None
        assert await made.hand_off()
        assert made.transport == "tcp"
        assert decode.transports["ucx"].connection(PREFILL) is None

    run(scenario, Fault.NONE)


def test_a_connection_made_again_outlives_the_one_before() -> None:
    async def scenario(made: Cluster) -> None:
        only, _ = made.addresses
        await made.pair.run(only)
        made.proxy.silence()
        made.pair.prefill.connections.give_up(DECODE)
        await made.pair.pass_time(1.0)
        await made.pair.run(only)
        assert made.pair.has_finished and made.transport == "ucx"
        made.proxy.cut_silenced()  # only now the decode worker could notice by itself
        await made.pair.pass_time(1.0)
        assert made.transport == "ucx"
        assert made.pair.decode.connections.get(PREFILL) is not None

    run(scenario, Fault.NONE)
