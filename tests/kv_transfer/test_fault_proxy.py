"""Hand-offs over tcp through a proxy that corrupts one connection each.

Whatever it does, the messages that arrive are those that were sent, in their order; the hand-off
ends with a typed failure or with the right pages, and leaves neither page nor slot behind.
"""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from fault_proxy import Fault, FaultPlan, FaultProxy, Mangler
from handoff_pair import DECODE, PREFILL
from hypothesis import given
from hypothesis import strategies as st
from linked_pair import LinkedPair, LinkedWorker, Recorder

from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.tasks import TaskSet, first_of

NUM_BYTES = 7000  # about what a hand-off sends in the direction of the pages
PATIENCE_S = 60.0
TYPED = {
    pb.FAILURE_CODE_PEER_LOST,
    pb.FAILURE_CODE_STALLED,
    pb.FAILURE_CODE_INTEGRITY,
}


async def hand_off(plan: FaultPlan) -> tuple[LinkedPair, bool]:
    """One hand-off through a proxy; whether the fault has happened."""
    async with AsyncExitStack() as stack:
        tasks = TaskSet()
        stack.push_async_callback(tasks.cancel)
        pair = LinkedPair(tasks)
        for worker, name in ((pair.prefill, PREFILL), (pair.decode, DECODE)):
            transport = TcpTransport(incarnation=name, handler=worker, host="127.0.0.1")
            worker.start(Recorder(transport))
            await transport.start()
            stack.push_async_callback(worker.close)
        address = pair.decode.transport.address.decode()
        proxy = await stack.enter_async_context(FaultProxy(address, plan).run())
        async with asyncio.timeout(PATIENCE_S):
            await first_of(pair.run(("tcp", proxy.address.encode())), tasks.failure())
        check(pair)
        return pair, proxy.has_happened


def check(pair: LinkedPair) -> None:
    """What holds after every hand-off."""
    assert pair.has_finished or set(pair.failures) & TYPED or pair.was_aborted
    for sender, receiver in ((pair.prefill, pair.decode), (pair.decode, pair.prefill)):
        assert receiver.arrived == sender.transport.sent[: len(receiver.arrived)]
        check_books(sender)


def check_books(worker: LinkedWorker) -> None:
    worker.core.check_integrity()
    assert worker.core.pool.num_available == worker.core.pool.num_pages


def inject(num_faults: int, seed: int, faults: list[Fault]) -> Counter[str]:
    """So many faults; what came of them."""
    source = random.Random(seed)
    outcomes: Counter[str] = Counter()

    async def run() -> None:
        while outcomes.total() < num_faults:
            pair, has_happened = await hand_off(FaultPlan.draw(source, NUM_BYTES, faults))
            if has_happened:
                outcomes["right" if pair.has_finished else "failed"] += 1

    asyncio.run(run())
    return outcomes


def test_without_a_fault_a_hand_off_succeeds() -> None:
    plan = FaultPlan(fault=Fault.NONE, upstream=True, offset=0, length=1)
    pair, has_happened = asyncio.run(hand_off(plan))
    assert pair.has_finished and not pair.failures and not has_happened


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.NONE])
def test_no_fault_goes_unnoticed(fault: Fault) -> None:
    outcomes = inject(30, seed=len(fault), faults=[fault])
    assert outcomes.total() == 30
    if fault is Fault.DELAY:
        assert outcomes["failed"] == 0
    else:
        assert outcomes["failed"] > 0


@pytest.mark.slow
def test_ten_thousand_faults() -> None:
    outcomes = inject(10_000, seed=1, faults=[fault for fault in Fault if fault is not Fault.NONE])
    assert outcomes["right"] and outcomes["failed"]


@given(
    st.sampled_from([Fault.NONE, Fault.DELAY]),
    st.binary(max_size=300),
    st.integers(0, 300),
    st.data(),
)
def test_what_is_only_late_is_complete(
    fault: Fault, sent: bytes, offset: int, draw: st.DataObject
) -> None:
    mangler = Mangler(FaultPlan(fault=fault, upstream=True, offset=offset, length=10))
    received = b""
    while sent_part := sent[: draw.draw(st.integers(1, 100))]:
        received += b"".join(mangler.feed(sent_part))
        sent = sent[len(sent_part) :]
    assert mangler.has_happened == (fault is Fault.DELAY and offset < len(received))
