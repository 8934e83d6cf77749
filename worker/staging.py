"""The buffers through which frames leave a device: in host memory, or in that of the device."""

from typing import Protocol

from torch import Tensor

from pagewire.engine.copy_stream import Completion, CopyStream
from pagewire.engine.device_pages import DevicePages
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.worker.device_checksums import DeviceChecksums
from pagewire.worker.frame_reads import Payload
from pagewire.worker.send_buffers import SendBuffers


class ReadablePages(Protocol):
    """The pages of a worker, on a device or on those of several ranks."""

    layout: KVLayout

    def gather(
        self,
        part: FrameRange,
        page_table: tuple[int, ...],
        into: Tensor,
        after: Completion | None = None,
    ) -> Completion:
        """Begin to copy `part` of a sequence out of its pages, once `after` has come.

        into: uint8 [bytes of the part].
        """


class Staging(Protocol):
    """One kind of memory. Used by one thread, its buffers apart."""

    buffers: SendBuffers

    def begin(
        self, part: FrameRange, page_table: tuple[int, ...], buffer: int, after: Completion | None
    ) -> Completion:
        """Begin to copy `part` of a sequence there, once `after` has come."""

    def finish(self, part: FrameRange, buffer: int) -> tuple[int, Payload]:
        """The checksum of what was copied, once it is there, and what a connection sends."""


class HostStaging:
    """Implements Staging: any transport sends from there."""

    def __init__(
        self, pages: ReadablePages, copies: CopyStream, *, num_buffers: int, buffer_bytes: int
    ) -> None:
        """A buffer holds one frame."""
        self.buffers = SendBuffers(num_buffers)
        self._pages = pages
        memory = copies.host_memory(num_buffers * buffer_bytes)
        self._memory = memory.view(num_buffers, buffer_bytes)

    def begin(
        self, part: FrameRange, page_table: tuple[int, ...], buffer: int, after: Completion | None
    ) -> Completion:
        return self._pages.gather(part, page_table, self._data(part, buffer), after)

    def finish(self, part: FrameRange, buffer: int) -> tuple[int, Payload]:
        payload = self._data(part, buffer).numpy().data
        return checksum(payload), (payload,)

    def _data(self, part: FrameRange, buffer: int) -> Tensor:
        return self._memory[buffer, : part.num_bytes(self._pages.layout)]


class DeviceStaging:
    """Implements Staging, for pairs whose connection moves the memory of devices.

    The device also makes the checksum, behind the copy and in the same stream.
    """

    def __init__(
        self, pages: DevicePages, copies: CopyStream, *, num_buffers: int, buffer_bytes: int
    ) -> None:
        """A buffer holds one frame."""
        self.buffers = SendBuffers(num_buffers)
        self._pages = pages
        self._copies = copies
        memory = copies.device_memory(num_buffers * buffer_bytes)
        self._memory = memory.view(num_buffers, buffer_bytes)
        self._checksums = DeviceChecksums(copies, num_buffers)

    def begin(
        self, part: FrameRange, page_table: tuple[int, ...], buffer: int, after: Completion | None
    ) -> Completion:
        data = self._data(part, buffer)
        self._pages.gather(part, page_table, data, after)
        return self._checksums.begin(buffer, data)

    def finish(self, part: FrameRange, buffer: int) -> tuple[int, Payload]:
        data = self._data(part, buffer)
        return self._checksums.value(buffer, len(data)), self._copies.lend(data)

    def _data(self, part: FrameRange, buffer: int) -> Tensor:
        return self._memory[buffer, : part.num_bytes(self._pages.layout)]
