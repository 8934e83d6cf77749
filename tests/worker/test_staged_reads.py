"""Frames out of a device's pages: several copies at a time, in as many buffers as there are."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fake_device import FakeDeviceMemory, page_sum
from handoff_pair import DECODE, LAYOUT, page_frame
from held_copies import HeldCopies

from pagewire.engine.device_pages import DevicePages
from pagewire.engine.kv_cache import KVCache
from pagewire.kv_transfer.checksum import checksum, checksum_of_sum
from pagewire.worker.effects import SendFrame
from pagewire.worker.interval import Interval
from pagewire.worker.staged_reads import StagedReads
from pagewire.worker.staging import DeviceStaging, HostStaging

NUM_PAGES = 4
NUM_BUFFERS = 4
TABLE = (2, 0, 3, 1)
_TURNS = 20  # of the event loop: enough for everything that can happen


def effect(page: int, receiver: bytes = DECODE) -> SendFrame:
    """One page of a sequence."""
    return SendFrame(frame=page_frame(page, receiver=receiver), page_table=TABLE)


class Stage:
    """Reads out of pages that hold their numbers."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.cache = KVCache(LAYOUT, NUM_PAGES)
        for page in range(NUM_PAGES):
            self.cache.pool[page].fill_(page + 1)
        self.copies = HeldCopies()
        self.thread = thread
        self.direct: set[bytes] = set()  # peers to which frames go from device to device
        pages = DevicePages(self.cache, self.copies)
        sizes = {"num_buffers": NUM_BUFFERS, "buffer_bytes": LAYOUT.page_bytes}
        self.reads = StagedReads(
            self.copies,
            host=HostStaging(pages, self.copies, **sizes),
            device=DeviceStaging(pages, self.copies, **sizes),
            is_direct=self.direct.__contains__,
            thread=thread,
            clock=lambda: 5.0,
        )

    async def await_begun(self, count: int) -> None:
        await asyncio.to_thread(self.copies.await_held, count)


def run(scenario: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    async def staged() -> None:
        with ThreadPoolExecutor(1) as thread:
            await asyncio.wait_for(scenario(Stage(thread)), 60)

    asyncio.run(staged())


def test_copies_are_begun_before_others_are_complete() -> None:
    async def scenario(stage: Stage) -> None:
        reading = [stage.reads.begin(effect(page)) for page in (0, 1)]
        await stage.await_begun(2)
        assert not any(each.done() for each in reading)
        stage.copies.free()
        for page, each in enumerate(reading):
            read = await each
            assert read.gathered == Interval(5.0, 5.0)
            assert isinstance(read.payload, tuple)
            assert b"".join(read.payload) == bytes([TABLE[page] + 1]) * LAYOUT.page_bytes
            assert read.frame.checksum == checksum(*read.payload)
            stage.reads.end(read)

    run(scenario)


def test_a_frame_that_goes_to_a_device_is_copied_and_summed_there() -> None:
    """Both in the order in which they were begun, and with buffers of its own."""

    async def scenario(stage: Stage) -> None:
        stage.direct.add(DECODE)
        reading = stage.reads.begin(effect(1))
        others = [stage.reads.begin(effect(page, receiver=bytes(16))) for page in range(2)]
        await stage.await_begun(4)
        stage.copies.release(1)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        assert not reading.done()
        stage.copies.free()
        read = await reading
        assert isinstance(read.payload, FakeDeviceMemory)
        data = read.payload.read()
        assert data.tobytes() == bytes([TABLE[1] + 1]) * LAYOUT.page_bytes
        total = page_sum(data.view(np.uint64))
        assert read.frame.checksum == checksum_of_sum(total, len(data))
        for each in (read, *[await other for other in others]):
            stage.reads.end(each)

    run(scenario)


def test_a_frame_waits_for_a_buffer_and_one_peer_never_has_all() -> None:
    async def scenario(stage: Stage) -> None:
        stage.copies.free()
        mine = [stage.reads.begin(effect(page)) for page in range(3)]
        other = await stage.reads.begin(effect(3, receiver=bytes(16)))
        first, second = await mine[0], await mine[1]
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        assert not mine[2].done()
        assert len({first.buffer, second.buffer, other.buffer}) == 3
        stage.reads.end(first)
        assert (await mine[2]).buffer not in {second.buffer, other.buffer}

    run(scenario)


def test_a_frame_is_read_behind_what_was_reported_as_computed() -> None:
    """And not behind what the model's thread has told the device since."""

    async def scenario(stage: Stage) -> None:
        loop = asyncio.get_running_loop()
        reading: list[asyncio.Future[Any]] = []

        def report(page: int) -> None:
            reading.append(stage.reads.begin(effect(page)))

        def compute() -> None:
            for page in (0, 1):
                stage.reads.mark_computed()
                loop.call_soon_threadsafe(report, page)

        await loop.run_in_executor(None, compute)
        await stage.await_begun(2)
        first, second = stage.copies.marks
        first.come()
        stage.copies.release(1)
        await reading[0]
        assert not reading[1].done()
        stage.cache.pool[TABLE[1]].fill_(9)  # the step goes on
        second.come()
        stage.copies.release()
        assert set((await reading[1]).payload[0]) == {9}

    run(scenario)
