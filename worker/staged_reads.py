"""Frames out of the pages of a device, through buffers that transports send from.

The device copies behind the steps that compute a frame, and the steps never wait: copies of several
frames are begun before the first is complete.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from pagewire.engine.copy_stream import Completion, CopyStream
from pagewire.kv_transfer.layout import FrameRange
from pagewire.worker.effects import SendFrame
from pagewire.worker.frame_reads import Payload, ReadFrame
from pagewire.worker.interval import Interval
from pagewire.worker.staging import Staging


class StagedReads:
    """Implements `pagewire.worker.frame_reads.FrameReads`. Made on the event loop."""

    def __init__(
        self,
        copies: CopyStream,
        *,
        host: Staging,
        device: Staging | None,
        is_direct: Callable[[bytes], bool],
        thread: Executor,
        clock: Callable[[], float],
    ) -> None:
        """`copies`: of the device that computes, which is that of rank 0. `host`, `device`: where
        frames are staged. `is_direct`: whether those to that peer go from device to device; without
        `device` it never is. `thread` is one thread: it begins copies, in their order, and waits.
        """
        self._copies = copies
        self._is_direct = is_direct
        self._thread = thread
        self._clock = clock
        self._host = host
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._computed: Completion | None = None  # of what the event loop knows to be computed

    def mark_computed(self) -> Completion:
        completion = self._copies.mark()
        # Callbacks of other threads run in their order: this one before the report.
        self._loop.call_soon_threadsafe(self._set_computed, completion)
        return completion

    def begin(self, effect: SendFrame) -> asyncio.Future[ReadFrame]:
        staging = self._staging(is_direct=self._is_direct(effect.frame.id.receiver))
        return asyncio.ensure_future(self._read(effect, staging, self._computed))

    def end(self, read: ReadFrame) -> None:
        if read.buffer is not None:
            staging = self._staging(is_direct=not isinstance(read.payload, tuple))
            staging.buffers.give_back(read.frame.id.receiver, read.buffer)

    def _staging(self, *, is_direct: bool) -> Staging:
        if not is_direct:
            return self._host
        assert self._device is not None, "no peer was offered frames from here"
        return self._device

    def _set_computed(self, completion: Completion) -> None:
        self._computed = completion

    async def _read(
        self, effect: SendFrame, staging: Staging, computed: Completion | None
    ) -> ReadFrame:
        frame = effect.frame
        buffer = await staging.buffers.take(frame.id.receiver)
        started = self._clock()
        copied = await self._loop.run_in_executor(
            self._thread, staging.begin, frame.part, effect.page_table, buffer, computed
        )
        checksum, payload = await self._loop.run_in_executor(
            self._thread, _finish, staging, frame.part, buffer, copied
        )
        return ReadFrame(
            frame=replace(frame, checksum=checksum),
            payload=payload,
            gathered=Interval(started, self._clock()),
            buffer=buffer,
        )


def _finish(
    staging: Staging, part: FrameRange, buffer: int, copied: Completion
) -> tuple[int, Payload]:
    copied.wait()
    return staging.finish(part, buffer)
