"""Frames of pages between two processes, as workers send them: header, checksum, scatter.

The sender reads a frame out of pages of a pool, the receiver verifies it in a slot and copies it
into pages of its own; both in a thread beside the event loop that runs the transport.
"""

import asyncio
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pagewire.engine.kv_cache import KVCache
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, FrameAck, HandoffId, decode, encode
from pagewire.kv_transfer.select import create_transports
from pagewire.kv_transfer.transport import Connection
from pagewire.worker.frames import FrameReader, FrameWriter

LAYOUT = KVLayout(page_size=64, num_layers=32, num_kv_heads=4, head_dim=64, dtype="bfloat16")
NUM_PAGES = 32
FRAME_BYTES = 2 * LAYOUT.page_bytes  # 4 MiB
NUM_BUFFERS = 4  # frames under way at once, and distinct buffers or slots at each end
SENDER, RECEIVER = b"s" * 16, b"r" * 16


@dataclass(slots=True, kw_only=True)
class PageRounds:
    """The Handler of both ends of the pages lane; frame `seq` lands in slot `seq % NUM_BUFFERS`."""

    writer: FrameWriter | None = None  # of the receiver
    arrived: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)  # messages
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def place(self, peer: bytes, header: bytes, length: int) -> memoryview:
        frame = decode(header)
        assert isinstance(frame, Frame) and self.writer is not None
        return self.writer.slot(frame.slot, length)

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.arrived.put_nowait(decode(header))

    def lost(self, peer: bytes, reason: str) -> None:
        self.ended.set()


def make_cache() -> KVCache:
    cache = KVCache(LAYOUT, NUM_PAGES)
    cache.buffer()[:] = os.urandom(LAYOUT.page_bytes) * NUM_PAGES
    return cache


def page_table(seq: int) -> tuple[int, ...]:
    """Two pages of the pool that are no neighbours: the frame has two runs."""
    return (2 * seq % NUM_PAGES, (2 * seq + 7) % NUM_PAGES)


class PagesLane:
    """Frames of pages over tcp as workers send them, NUM_BUFFERS at a time."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._reader = FrameReader(LAYOUT, make_cache().buffer())
        self._rounds = PageRounds()
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
            frame, payload = await self._loop.run_in_executor(
                self._thread, self._reader.read, make_frame(seq), page_table(seq)
            )
            send = self._connection.send(encode(frame), *payload)
            sends.append(asyncio.create_task(send))
        await asyncio.gather(*sends)
        for _ in range(min(num_frames, NUM_BUFFERS)):
            await self._rounds.arrived.get()

    def close(self) -> None:
        self._loop.run_until_complete(self._transport.close())
        self._thread.shutdown()
        self._loop.close()


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


async def receive_pages() -> None:
    writer = FrameWriter(make_cache(), num_slots=NUM_BUFFERS, slot_bytes=FRAME_BYTES)
    rounds = PageRounds(writer=writer)
    transport = create_transports("tcp", RECEIVER, rounds, "127.0.0.1").transports[0]
    await transport.start()
    print(transport.address.decode(), flush=True)
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(max_workers=1)

    async def answer() -> None:
        while True:
            frame = await rounds.arrived.get()
            is_sound = await loop.run_in_executor(
                thread, writer.write, frame, LAYOUT, page_table(frame.seq)
            )
            assert is_sound
            connection = transport.connection(SENDER)
            assert connection is not None
            await connection.send(encode(FrameAck(id=frame.id.reply(), seq=frame.seq)))

    answering = asyncio.create_task(answer())
    await rounds.ended.wait()
    answering.cancel()
    thread.shutdown()
    await transport.close()


def seconds_around_a_frame(num_frames: int = 32) -> float:
    """What header, checksum and scatter of one frame cost both ends, in seconds of one core."""
    reader = FrameReader(LAYOUT, make_cache().buffer())
    writer = FrameWriter(make_cache(), num_slots=NUM_BUFFERS, slot_bytes=FRAME_BYTES)
    seconds = []
    for seq in range(num_frames):
        started = time.thread_time()
        frame, payload = reader.read(make_frame(seq), page_table(seq))
        sent = decode(encode(frame))
        between = time.thread_time()
        assert isinstance(sent, Frame)
        landed = writer.slot(sent.slot, FRAME_BYTES)
        for start, part in zip((0, FRAME_BYTES // 2), payload, strict=True):
            landed[start : start + len(part)] = part  # the transport's part
        landed_at = time.thread_time()
        assert writer.write(sent, LAYOUT, page_table(seq))
        seconds.append(between - started + time.thread_time() - landed_at)
    return statistics.median(seconds)
