"""Frames of pages between two processes: as workers send them, and the same bytes without that.

A worker checksums a frame and sends it out of its pages; the other lets it land in pages of its own
and verifies it. `BarePages` moves the same bytes from and to the same pages over the same
transport, so the difference between the two is what header and checksum cost.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from pagewire.engine.kv_cache import KVCache
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.layout import KVLayout, byte_runs
from pagewire.kv_transfer.messages import Frame, FrameAck, HandoffId, decode, encode
from pagewire.kv_transfer.select import create_transports
from pagewire.kv_transfer.transport import Connection
from pagewire.worker.frames import FrameReader, FrameWriter

LAYOUT = KVLayout(page_size=64, num_layers=32, num_kv_heads=4, head_dim=64, dtype="bfloat16")
NUM_PAGES = 32
FRAME_BYTES = 2 * LAYOUT.page_bytes  # 4 MiB
NUM_BUFFERS = 4  # frames under way at once, and distinct buffers at each end
SENDER, RECEIVER = b"s" * 16, b"r" * 16


def make_cache() -> KVCache:
    cache = KVCache(LAYOUT, NUM_PAGES)
    cache.buffer()[:] = os.urandom(LAYOUT.page_bytes) * NUM_PAGES
    return cache


def page_table(seq: int) -> tuple[int, ...]:
    """Two pages of the pool that are no neighbours: the frame has two runs."""
    return (2 * seq % NUM_PAGES, (2 * seq + 7) % NUM_PAGES)


def make_frame(seq: int) -> Frame:
    return Frame(
        id=HandoffId(request_id="bench", attempt=1, sender=SENDER, receiver=RECEIVER),
        seq=seq,
        slot=seq % NUM_BUFFERS,
        slot_generation=1,
        first_page=0,
        num_pages=FRAME_BYTES // LAYOUT.page_bytes,
        first_layer=0,
        num_layers=LAYOUT.num_layers,
        layout_digest=LAYOUT.digest(),
        prefix_hash=bytes(16),
        checksum=0,
    )


class Pages(Protocol):
    """What either end does with a frame before and after the transport has it."""

    def read(self, seq: int) -> tuple[bytes, tuple[memoryview, ...]]:
        """Header and payload."""

    def land(self, header: bytes) -> Landing:
        """Where the payload goes."""

    def settle(self, header: bytes) -> bytes:
        """The payload is there: the answer to the sender."""


class BarePages:
    """Moves pages and nothing else."""

    def __init__(self) -> None:
        self._pool = make_cache().buffer()

    def read(self, seq: int) -> tuple[bytes, tuple[memoryview, ...]]:
        return seq.to_bytes(4, "big"), self._runs(seq)

    def land(self, header: bytes) -> Landing:
        return Landing(*self._runs(int.from_bytes(header, "big")))

    def settle(self, header: bytes) -> bytes:
        return header

    def _runs(self, seq: int) -> tuple[memoryview, ...]:
        runs = byte_runs(LAYOUT, make_frame(seq).part, page_table(seq))
        return tuple(self._pool[offset : offset + length] for offset, length in runs)


class CheckedPages:
    """What workers do."""

    def __init__(self) -> None:
        self._reader = FrameReader(LAYOUT, make_cache().buffer())
        self._writer = FrameWriter(make_cache(), num_slots=NUM_BUFFERS, slot_bytes=FRAME_BYTES)

    def read(self, seq: int) -> tuple[bytes, tuple[memoryview, ...]]:
        frame, payload = self._reader.read(make_frame(seq), page_table(seq))
        return encode(frame), payload

    def land(self, header: bytes) -> Landing:
        frame = decode(header)
        assert isinstance(frame, Frame)
        return self._writer.land_in_pages(frame, page_table(frame.seq))

    def settle(self, header: bytes) -> bytes:
        frame = decode(header)
        assert isinstance(frame, Frame) and self._writer.is_sound(frame)
        return encode(FrameAck(id=frame.id.reply(), seq=frame.seq))


class PageRounds:
    """The Handler of both ends."""

    def __init__(self, pages: Pages) -> None:
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()  # headers
        self.ended = asyncio.Event()
        self._pages = pages

    def place(self, peer: bytes, header: bytes, length: int) -> Landing:
        return self._pages.land(header)

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.arrived.put_nowait(header)

    def lost(self, peer: bytes, reason: str) -> None:
        self.ended.set()


class PagesLane:
    """Frames of pages over tcp, NUM_BUFFERS at a time."""

    def __init__(self, pages: Pages, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pages = pages
        self._rounds = PageRounds(pages)
        self._loop.run_until_complete(self._connect(address))

    async def _connect(self, address: str) -> None:
        self._transport = create_transports("tcp", SENDER, self._rounds, "127.0.0.1").transports[0]
        await self._transport.start()
        self._connection: Connection = await self._transport.connect(RECEIVER, address.encode())

    def send(self, num_frames: int) -> None:
        self._loop.run_until_complete(self._send(num_frames))

    async def _send(self, num_frames: int) -> None:
        sends = []
        for seq in range(num_frames):
            if seq >= NUM_BUFFERS:
                await self._rounds.arrived.get()  # its slot is free
            header, payload = await self._loop.run_in_executor(self._thread, self._pages.read, seq)
            sends.append(asyncio.create_task(self._connection.send(header, *payload)))
        await asyncio.gather(*sends)
        for _ in range(min(num_frames, NUM_BUFFERS)):
            await self._rounds.arrived.get()

    def close(self) -> None:
        self._loop.run_until_complete(self._transport.close())
        self._thread.shutdown()
        self._loop.close()


async def receive_pages(pages: Pages) -> None:
    rounds = PageRounds(pages)
    transport = create_transports("tcp", RECEIVER, rounds, "127.0.0.1").transports[0]
    await transport.start()
    print(transport.address.decode(), flush=True)

    async def answer() -> None:
        while True:
            reply = pages.settle(await rounds.arrived.get())
            connection = transport.connection(SENDER)
            assert connection is not None
            await connection.send(reply)

    answering = asyncio.create_task(answer())
    await rounds.ended.wait()
    answering.cancel()
    await transport.close()
