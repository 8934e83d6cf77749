"""UCX on the event loop: what cannot move keeps nothing else from running."""

import asyncio

import pytest

from pagewire.kv_transfer.select import probe
from pagewire.kv_transfer.ucx_library import UcxLibrary, open_library
from pagewire.kv_transfer.ucx_link import UcxLink

pytestmark = pytest.mark.skipif(not probe().usable, reason="ucxx is not installed")

NUM_BYTES = 16 << 20  # more than UCX has room for between two processes
NUM_POLLS = 20


class ObservedLink(UcxLink):
    """Counts what it does, and can be stopped as a process can."""

    def __init__(self, library: UcxLibrary) -> None:
        super().__init__(library)
        self.stops_after: int | None = None  # turns
        self.num_turns = 0
        self.polls: asyncio.Queue[None] = asyncio.Queue()

    def _run_turn(self) -> None:
        self.num_turns += 1
        if self.stops_after is None or self.num_turns <= self.stops_after:
            super()._run_turn()

    def _on_poll(self) -> None:
        self.polls.put_nowait(None)
        super()._on_poll()


async def connect() -> tuple[ObservedLink, ObservedLink]:
    library = open_library("127.0.0.1")
    first, second = ObservedLink(library), ObservedLink(library)
    await asyncio.gather(first.connect(second.address), second.connect(first.address))
    return first, second


def test_a_link_whose_peer_has_stopped_does_not_keep_the_loop_busy() -> None:
    asyncio.run(send_to_a_peer_that_stops())


async def send_to_a_peer_that_stops() -> None:
    sender, receiver = await connect()
    loop = asyncio.get_running_loop()
    payload, target = memoryview(bytes(range(256)) * (NUM_BYTES // 256)), bytearray(NUM_BYTES)
    sent, received = loop.create_future(), loop.create_future()
    sender.send(payload, sent)
    receiver.receive(memoryview(target), received)
    receiver.stops_after = receiver.num_turns + 8  # in the middle
    for _ in range(NUM_POLLS):  # until what was left to do is done, and it polls
        await sender.polls.get()
    num_turns = sender.num_turns
    for _ in range(NUM_POLLS):
        await sender.polls.get()
    assert sender.num_turns - num_turns <= 3 * NUM_POLLS

    assert not sent.done()
    receiver.stops_after = None
    await asyncio.gather(sent, received)
    assert target == payload
    for link in (sender, receiver):
        link.close()
        await link.wait_closed()
