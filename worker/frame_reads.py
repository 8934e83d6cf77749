"""Frames out of pages, beside the event loop: what a prefill worker does before it sends them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from pagewire.engine.copy_stream import Completion
from pagewire.kv_transfer.device_memory import DeviceMemory
from pagewire.kv_transfer.messages import Frame
from pagewire.worker.effects import SendFrame
from pagewire.worker.frames import PageReader
from pagewire.worker.interval import Interval

# In host memory, of one part or several, or in that of a device.
Payload = tuple[memoryview, ...] | DeviceMemory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadFrame:
    """A frame that can be sent."""

    frame: Frame  # with its checksum
    payload: Payload
    gathered: Interval
    buffer: int | None = None  # that the payload lies in; None: in pages


class FrameReads(Protocol):
    """Reads frames one after another. Called on the event loop, `mark_computed` apart."""

    def mark_computed(self) -> Completion | None:
        """Called in the model's thread before it reports that layers, or a step, are computed.

        Frames that are begun from that report on are read when what this thread has told the device
        so far is done. Returns the end of that; None where the thread has done it itself.
        """

    def begin(self, effect: SendFrame) -> "asyncio.Future[ReadFrame]":
        """Begin to read a frame whose pages were reported as computed."""

    def end(self, read: ReadFrame) -> None:
        """Nobody reads the payload any more."""


class DirectReads:
    """Implements FrameReads for pages in host memory, which a transport reads where they are."""

    def __init__(self, reader: PageReader, *, thread: Executor, clock: Callable[[], float]) -> None:
        """`thread` makes the checksums."""
        self._reader = reader
        self._thread = thread
        self._clock = clock

    def mark_computed(self) -> None:
        """What the model's thread reports it has written itself."""
        return None

    def begin(self, effect: SendFrame) -> asyncio.Future[ReadFrame]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._read, effect)

    def end(self, read: ReadFrame) -> None:
        """The payload was never anywhere else than in its pages."""

    def _read(self, effect: SendFrame) -> ReadFrame:
        started = self._clock()
        frame, payload = self._reader.read(effect.frame, effect.page_table)
        return ReadFrame(frame=frame, payload=payload, gathered=Interval(started, self._clock()))
