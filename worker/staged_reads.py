"""Frames out of the pages of a device, through host memory that transports send from.

The device copies behind the steps that compute a frame, and the steps never wait: copies of several
frames are begun before the first is complete.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from torch import Tensor

from pagewire.engine.copy_stream import Completion, CopyStream
from pagewire.engine.device_pages import DevicePages
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.messages import Frame
from pagewire.worker.effects import SendFrame
from pagewire.worker.frame_reads import ReadFrame
from pagewire.worker.interval import Interval
from pagewire.worker.send_buffers import SendBuffers


class StagedReads:
    """Implements `pagewire.worker.frame_reads.FrameReads`. Made on the event loop."""

    def __init__(
        self,
        pages: DevicePages,
        copies: CopyStream,
        *,
        num_buffers: int,
        buffer_bytes: int,
        thread: Executor,
        clock: Callable[[], float],
    ) -> None:
        """A buffer holds one frame. `thread` is one thread: it begins copies, in their order, and
        waits for them.
        """
        self._pages = pages
        self._copies = copies
        self._thread = thread
        self._clock = clock
        memory = copies.host_memory(num_buffers * buffer_bytes)
        self._memory = memory.view(num_buffers, buffer_bytes)
        self._buffers = SendBuffers(num_buffers)
        self._loop = asyncio.get_running_loop()
        self._computed: Completion | None = None  # of what the event loop knows to be computed

    def mark_computed(self) -> Completion:
        completion = self._copies.mark()
        # Callbacks of other threads run in their order: this one before the report.
        self._loop.call_soon_threadsafe(self._set_computed, completion)
        return completion

    def begin(self, effect: SendFrame) -> asyncio.Future[ReadFrame]:
        return asyncio.ensure_future(self._read(effect, self._computed))

    def end(self, read: ReadFrame) -> None:
        if read.buffer is not None:
            self._buffers.give_back(read.frame.id.receiver, read.buffer)

    def _set_computed(self, completion: Completion) -> None:
        self._computed = completion

    async def _read(self, effect: SendFrame, computed: Completion | None) -> ReadFrame:
        frame = effect.frame
        buffer = await self._buffers.take(frame.id.receiver)
        payload = self._memory[buffer, : frame.part.num_bytes(self._pages.layout)]
        started = self._clock()
        copied = await self._loop.run_in_executor(
            self._thread, self._pages.gather, frame.part, effect.page_table, payload, computed
        )
        frame = await self._loop.run_in_executor(self._thread, _check, frame, payload, copied)
        return ReadFrame(
            frame=frame,
            payload=(payload.numpy().data,),
            gathered=Interval(started, self._clock()),
            buffer=buffer,
        )


def _check(frame: Frame, payload: Tensor, copied: Completion) -> Frame:
    """The frame with the checksum of its payload, once that is there."""
    copied.wait()
    return replace(frame, checksum=checksum(payload.numpy().data))
